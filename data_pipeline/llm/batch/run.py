"""One batch of a Batch API, from the ledger's plan to its answers in the ledger."""

import asyncio
import random
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from data_pipeline.llm.ask import Traffic, overcharged, wait_before_retry
from data_pipeline.llm.batch.client import ENDED, BatchClient, BatchState
from data_pipeline.llm.batch.rows import RowReader
from data_pipeline.llm.batch_journal import Member, OpenBatch
from data_pipeline.llm.completion import AnswerReader, Bounds
from data_pipeline.llm.connection import CallError
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.options import Batching, RetryPolicy
from data_pipeline.records.record import digest
from megaphi.errors import RunError

MAX_BYTES = 200_000_000  # of one file; OpenAI's limit
MAX_HOURS = 26.0  # after which a batch that does not end is cancelled
_ROW_BYTES, _TOKEN_BYTES = 16_384, 64  # of an answer's row: room for all, and a token of content
TOO_MUCH = ("token_limit_exceeded", "rate_limit_exceeded")  # a refusal that passes
_KEPT = "the batch stays in the ledger: run again to go on, or give it up with `abandon_batches`"

Result = TypeVar("Result")


@dataclass
class BatchRunner:
    """Runs batches of one model on one server.

    Attributes:
        client: the server.
        reader: reads its answers.
        ledger: where answers and batches are kept.
        policy: what to do when a call fails.
        batching: sizes and times.
        model: of all requests.
        say: takes a few words for the progress line.
        traffic: what was sent and came back.
        answered: requests answered in this run; the caller clears it.
    """

    client: BatchClient
    reader: AnswerReader
    ledger: Ledger
    policy: RetryPolicy
    batching: Batching
    model: str
    say: Callable[[str], None]
    traffic: Traffic = field(default_factory=Traffic)
    answered: set[str] = field(default_factory=set)
    _states: dict[str, str] = field(default_factory=dict)
    _overcharged: str = ""

    async def recover(self) -> None:
        """Find and collect what a killed run has started."""
        mine = [
            batch
            for batch in self.ledger.batches.values()
            if (batch.server, batch.model) == (self.client.base.url, self.model)
        ]
        for batch in mine:
            identifier = batch.id
            if batch.step == "creating":
                state = await self._look_for(batch)
                if state is not None:
                    identifier = state.id
                    await self.ledger.note_batch(batch.tag, "created", id=identifier)
            if identifier:
                self.traffic.sent += len(batch.members)
                await self._finish(batch, identifier)
            else:  # it was never started
                await self.ledger.note_batch(batch.tag, "closed", status="never started")

    async def run(
        self, members: dict[str, Member], lines: Callable[[], Iterable[bytes]]
    ) -> dict[str, CallError]:
        """Journal, upload, start and collect one batch.

        Args:
            members: its requests.
            lines: of its file.

        Returns:
            The requests that were not answered, and why.

        Raises:
            RunError: a call failed for good, or the server refuses such a batch.
        """
        # Chance makes the tag unlike those of other ledgers with the same requests.
        tag = digest([secrets.token_hex(16), *members])[:32]
        url = self.client.base.url
        await self.ledger.plan_batch(tag, url, self.model, members)
        self._note(tag, "uploading")
        with tempfile.TemporaryFile(dir=self.ledger.path.parent) as stream:
            stream.writelines(lines())
            file = await self._insist("upload", lambda: self.client.upload(tag, stream))
        batch = self.ledger.batches[tag]
        state = await self._start(batch, file)
        await self.ledger.note_batch(tag, "created", id=state.id)
        self.traffic.sent += len(members)
        return await self._finish(batch, state.id)

    async def _start(self, batch: OpenBatch, file: str) -> BatchState:
        """Start a batch; where that fails in a way that may have started it, look for it."""

        async def start() -> BatchState:
            await self.ledger.note_batch(batch.tag, "creating", file=file)
            try:
                return await self.client.create(batch.tag, file)
            except CallError as error:
                if not error.retry or error.reason == "http_429":
                    raise
                state = await self._look_for(batch)
                if state is None:
                    raise
                return state

        return await self._insist("start", start)

    async def _look_for(self, batch: OpenBatch) -> BatchState | None:
        """Find a batch by its tag; None once it would be in the server's list and is not."""
        while True:
            state = await self._insist("find", lambda: self.client.find(batch.tag, batch.time))
            left = batch.time + self.batching.batch_settle - time.time()
            if state is not None or left <= 0:
                return state
            await asyncio.sleep(min(left, max(self.batching.poll_interval, 0.05)))

    async def _finish(self, batch: OpenBatch, identifier: str) -> dict[str, CallError]:
        """Wait for a batch, and merge its rows; returns what was not answered, and why."""
        state = await self._wait(batch, identifier)
        self._note(batch.tag, "collecting")
        rows = RowReader(batch.members, self.reader)
        limit = 2**20 + sum(
            _ROW_BYTES + _TOKEN_BYTES * member.completion for member in batch.members.values()
        )
        for file in filter(None, (state.output_file, state.error_file)):
            whole = await self._insist("download", lambda file=file: self._read(rows, file, limit))  # type: ignore[misc]
            self.traffic.batch["cut off"] += not whole
        errors: dict[str, CallError] = {}
        refused = state.status == "failed"
        for key in filter(self.ledger.is_open, batch.members):
            errors[key] = rows.errors.get(key) or self._no_row(state)
            self.traffic.failures[errors[key].reason] += 1
            if errors[key].billed:
                self.ledger.lose_later(key, errors[key].reason)
        await self.ledger.note_batch(batch.tag, "closed", status=state.status)
        self._note(batch.tag, "")
        if self._overcharged:
            raise RunError(self._overcharged)
        self.traffic.batch.update(rows.counts)
        self.traffic.batch[state.status] += 1
        if refused and errors:
            self._refuse(state)
        return errors

    async def _read(self, rows: RowReader, file: str, limit: int) -> bool:
        """Download a file once, storing its answers as they come."""
        rows.begin()

        async def take(lines: list[bytes | None]) -> None:
            answers = rows.take(lines, self.ledger.is_open)
            if answers:
                await self.ledger.store_many(answers)
                for key, answer in answers.items():
                    member = rows.members[key]
                    if answer.nano > member.nano:
                        bounds = Bounds(member.prompt, member.completion)
                        self._overcharged = overcharged(self.client.base.url, bounds, answer)
                self.answered.update(answers)
                self.traffic.answered += len(answers)
                used = sum(answer.completion_tokens for answer in answers.values())
                self.traffic.completion_tokens += used

        whole = await self.client.download(file, limit, take)
        rows.end()
        return whole

    def _no_row(self, state: BatchState) -> CallError:
        """Why a request has no row in the files of a batch."""
        if state.status == "failed":
            code, message = state.errors[0] if state.errors else ("batch_failed", "no reason given")
            return CallError(code if code in TOO_MUCH else "batch_failed", message)
        # The batch may have done it all the same: count it as paid.
        return CallError(
            "no_row", f"not in the files of a batch that is {state.status}", billed=True
        )

    def _refuse(self, state: BatchState) -> None:
        """A batch was refused as a whole.

        Raises:
            RunError: for a reason that will not pass.
        """
        error = self._no_row(state)
        if error.reason not in TOO_MUCH:
            reasons = "; ".join(f"{code}: {message}" for code, message in state.errors)
            raise RunError(
                f"{self.client.base.url}: refuses batch {state.id} "
                f"({reasons or 'no reason given'}); "
                "nothing of it was billed"
            )

    async def _wait(self, batch: OpenBatch, identifier: str) -> BatchState:
        """Look at a batch until it has ended; one that takes much too long is cancelled."""
        cancelled = False
        while True:
            state = await self._insist("look at", lambda: self.client.state(identifier))
            self._note(batch.tag, f"{state.status} {state.completed}/{len(batch.members)}")
            if state.status in ENDED:
                return state
            hours = (time.time() - batch.time) / 3600
            if hours > MAX_HOURS + 1:
                raise RunError(
                    f"{self.client.base.url}: batch {identifier} is {state.status} after "
                    f"{hours:.0f} hours and cannot be cancelled; {_KEPT}"
                )
            if hours > MAX_HOURS and not cancelled:
                cancelled = True
                await self._insist("cancel", lambda: self.client.cancel(identifier))
            await asyncio.sleep(self.batching.poll_interval * random.uniform(1, 1.05))

    async def _insist(self, what: str, call: Callable[[], Awaitable[Result]]) -> Result:
        """Make a call, again and again as the policy allows.

        Raises:
            RunError: it failed for good.
        """
        for attempt in range(self.policy.attempts):
            try:
                return await call()
            except CallError as error:
                self.traffic.failures[error.reason] += 1
                if not error.retry or attempt + 1 == self.policy.attempts:
                    raise RunError(
                        f"{self.client.base.url}: cannot {what} a batch ({error}); {_KEPT}"
                    ) from None
                await asyncio.sleep(wait_before_retry(self.policy, attempt, error))
        raise AssertionError("unreachable")

    def _note(self, tag: str, text: str) -> None:
        """Show what a batch is doing; "" when it is closed."""
        self._states[tag] = text
        shown = ", ".join(filter(None, self._states.values()))
        self._states = {key: value for key, value in self._states.items() if value}
        self.say(f"batches: {shown}" if shown else "")
