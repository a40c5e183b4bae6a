"""Asks many requests at a time: limiter, retries, ledger.

Answers come back in the order of the requests, whatever the order in which the server gave them, so
that everything that is decided on them is the same in every run.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from data_pipeline.llm.client import Client
from data_pipeline.llm.completion import Bounds, Request
from data_pipeline.llm.connection import CallError
from data_pipeline.llm.ledger import Answer, CostCapReached, Ledger
from data_pipeline.llm.limiter import Limiter
from data_pipeline.llm.options import RetryPolicy
from megaphi.errors import RunError

FIRST_WAIT = 0.5  # seconds before the second attempt; doubles with each
BILLED_ATTEMPTS = 2  # of a request whose failures may cost money
READ_AHEAD = 64  # requests, for each one in flight, that may be answered ahead of a slow one
OUTAGE = 8  # requests in a row that failed for good: the server is gone
PARAMETERS = (
    "a parameter that the server refuses can be left out (`leave_out` temperature), renamed "
    "(`rename` max_tokens=max_completion_tokens) or added (`set` NAME=VALUE); `merge_system` sends "
    "no system message, `answers` text no JSON schema"
)


def wait_before_retry(policy: RetryPolicy, attempt: int, error: CallError) -> float:
    """Seconds to wait after failed attempt number `attempt`, counted from 0."""
    if error.retry_after is not None:
        # A little later than the server says, so that waiting requests do not all come at once.
        return min(error.retry_after * random.uniform(1, 1.1), policy.max_wait)
    return random.uniform(0.5, 1) * min(FIRST_WAIT * 2.0**attempt, policy.max_wait)


@dataclass
class Traffic:
    """What was sent and came back in this run.

    Attributes:
        started: time of the first request, from `time.monotonic`.
        sent: requests sent, repeated ones included.
        answered: answers received and stored.
        reused: answers found in the ledger.
        failures: requests sent and not answered, by reason.
        completion_tokens: of the answers received.
        batch: batches by how they ended, and rows of them that were not used.
    """

    started: float = field(default_factory=time.monotonic)
    sent: int = 0
    answered: int = 0
    reused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    completion_tokens: int = 0
    batch: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def throttled_share(self) -> float:
        """Share of the requests that were answered with 429."""
        return self.failures["http_429"] / max(self.sent, 1)


@dataclass(frozen=True)
class Failure:
    """A request that was not answered in this run.

    Attributes:
        reason: a short fixed word (`http_500`, `timeout`, `malformed`, …).
        detail: what the server answered.
    """

    reason: str
    detail: str


Outcome = Answer | Failure


class Overcharged(Exception):
    """The server has counted more tokens than a request can take."""


class Asker:
    """Puts requests to one server.

    Args:
        client: the server.
        ledger: where answers are kept.
        limiter: how fast.
        policy: what to do when it fails.

    Attributes:
        traffic: what was sent and came back.
        cap_message: why asking ended early, "" when it did not.
    """

    def __init__(
        self, client: Client, ledger: Ledger, limiter: Limiter, policy: RetryPolicy
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._limiter = limiter
        self._policy = policy
        self._failed_in_a_row = 0
        self._last_error = ""
        self._overcharged = ""
        self._broken: RunError | None = None
        # The first request that costs money goes alone: what is wrong with all shows in one.
        self._first = asyncio.Lock()
        self._first_is_over = False
        self.traffic = Traffic()
        self.cap_message = ""

    async def ask_all(
        self,
        requests: Iterable[Request],
        in_flight: int,
        on_outcome: Callable[[int, Outcome], bool],
    ) -> bool:
        """Ask, and hand each outcome over in the order of the requests.

        Args:
            requests: what to ask; read as far as needed.
            in_flight: how many to work on at a time.
            on_outcome: called with (number of the request, outcome); false ends the work.

        Returns:
            Whether all was asked: false when the cost cap was reached first.

        Raises:
            RunError: no request can succeed, the server is gone, or it charges more than a request
                can cost.
        """
        numbered = enumerate(requests)
        ready: dict[int, Outcome] = {}
        # Two requests with the same prompt: the second waits and finds the answer in the ledger.
        turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        following, ended, self.cap_message = 0, False, ""

        def hand_over() -> None:
            nonlocal following, ended
            while not ended and following in ready:
                ended = not on_outcome(following, ready.pop(following))
                following += 1

        async def work() -> None:
            for number, request in numbered:
                turn = turns.setdefault(request.key, asyncio.Lock())
                async with turn:
                    try:
                        ready[number] = await self._outcome(request)
                    except CostCapReached as error:
                        self.cap_message = str(error)
                        return
                    except Overcharged:
                        return
                hand_over()
                # What comes after a request that takes long must not pile up.
                while number - following > READ_AHEAD * in_flight and not self._is_over:
                    await asyncio.sleep(0.05)
                if ended or self._is_over:
                    return

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self._overcharged:
            raise RunError(self._overcharged)
        if self._failed_in_a_row and not self.traffic.answered + self.traffic.reused:
            raise RunError(
                f"{self._client.base.url}: not one request was answered, the last failed with "
                f"{self._last_error}{self._advice}"
            )
        return not self.cap_message

    @property
    def _is_over(self) -> bool:
        """Whether nothing more may be asked; what is under way is waited for."""
        return bool(self.cap_message or self._overcharged)

    async def _outcome(self, request: Request) -> Outcome:
        """The stored answer of a request, or a new one.

        Raises:
            CostCapReached: asking might cost more than the cap leaves.
            Overcharged: the server has charged more than a request can cost.
            RunError: no request can succeed, or the server is gone.
        """
        stored = self._ledger.answer(request.key)
        if stored is not None:
            self.traffic.reused += 1
            return stored
        billed = 0
        for attempt in range(self._policy.attempts):
            try:
                return await self._first_alone(request)
            except CallError as error:
                self.traffic.failures[error.reason] += 1
                billed += error.billed
                last = attempt + 1 == self._policy.attempts or billed == BILLED_ATTEMPTS
                if last or not error.retry:
                    return self._give_up(error)
                wait = wait_before_retry(self._policy, attempt, error)
                if error.overloaded:
                    self._limiter.back_off(wait)  # every request waits, this one among them
                else:
                    await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _first_alone(self, request: Request) -> Answer:
        if not self._first_is_over and self._client.most(request):
            async with self._first:
                if not self._first_is_over:
                    try:
                        return await self._attempt(request)
                    finally:
                        self._first_is_over = True
        return await self._attempt(request)

    async def _attempt(self, request: Request) -> Answer:
        if self._overcharged:
            raise Overcharged
        if self._broken is not None:
            raise self._broken
        tokens = request.prompt_bound + request.max_tokens
        used = 0
        await self._limiter.acquire(tokens)
        try:
            await self._ledger.reserve(request.key, self._client.most(request))
            self.traffic.sent += 1
            used = tokens
            answer = await self._client.ask(request)
            used = answer.prompt_tokens + answer.completion_tokens
        except CallError as error:
            if error.billed:
                await self._ledger.lose(request.key, error.reason)
            else:
                await self._ledger.free(request.key, error.reason)
            raise
        except RunError as error:
            self._broken = error
            await self._ledger.free(request.key, "refused")
            raise
        finally:
            self._limiter.release(tokens - used)
        await self._ledger.store(request.key, answer)
        self._limiter.succeeded()
        self._failed_in_a_row = 0
        self.traffic.answered += 1
        self.traffic.completion_tokens += answer.completion_tokens
        if answer.nano > self._client.most(request):
            self._overcharged = overcharged(self._client.base.url, request.bounds, answer)
            raise Overcharged
        return answer

    def _give_up(self, error: CallError) -> Failure:
        """Leave a request unanswered.

        Raises:
            RunError: too many in a row were left so.
        """
        self._last_error = str(error)
        # A request that is refused for what it says (HTTP 400) accuses the server, or the options,
        # only as long as none has been answered.
        if error.retry or not self.traffic.answered + self.traffic.reused:
            self._failed_in_a_row += 1
        if self._failed_in_a_row >= OUTAGE:
            raise RunError(
                f"{self._client.base.url}: {OUTAGE} requests in a row failed, the last with "
                f"{error}; answers so far are kept, run again to go on{self._advice}"
            )
        return Failure(error.reason, str(error))

    @property
    def _advice(self) -> str:
        """What to do about requests that are refused for what they say."""
        refused = self._last_error.startswith(("http_400", "http_422"))
        return f"; {PARAMETERS}" if refused else ""


def overcharged(url: str, bounds: Bounds, answer: Answer) -> str:
    """What to tell the user when a server charges more than a request can cost."""
    return (
        f"{url}: charged {answer.prompt_tokens} prompt and {answer.completion_tokens} completion "
        f"tokens where a request can take {bounds.prompt} and {bounds.completion}: no cap holds "
        "there; it is booked as charged and its answer kept; raise `max_tokens`, give thoughts "
        "room with `reasoning_tokens`, or name the limit as the server knows it (`rename` "
        "max_tokens=max_completion_tokens)"
    )
