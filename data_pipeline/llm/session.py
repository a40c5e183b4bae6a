"""One run against one server: what the command line says, put to work, with a line of progress."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from data_pipeline.llm.ask import Asker, Outcome, Traffic
from data_pipeline.llm.batch.batcher import Batcher
from data_pipeline.llm.batch.client import BatchClient
from data_pipeline.llm.batch.run import BatchRunner
from data_pipeline.llm.client import Client
from data_pipeline.llm.completion import AnswerReader, Request
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.limiter import Limiter
from data_pipeline.llm.options import Sending
from data_pipeline.llm.prices import Price, dollars
from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import BaseUrl

TERMINAL_SECONDS, LOG_SECONDS = 1.0, 30.0  # between progress lines


@dataclass(frozen=True, kw_only=True)
class Server:
    """A model on a server.

    Attributes:
        base: where it is.
        model: its name there.
        key: the API key.
        price: of the model.
    """

    base: BaseUrl
    model: str
    key: Secret | None = None
    price: Price = field(default_factory=lambda: Price(0, 0))


@dataclass
class Progress:
    """Counts for the progress line.

    Attributes:
        what: the verb.
        total: requests in all.
        done: requests with an outcome.
        accepted: samples that count.
        note: a few words more.
    """

    what: str
    total: int
    done: int = 0
    accepted: int = 0
    note: str = ""

    def line(self, traffic: Traffic, ledger: Ledger) -> str:
        """Accepted a minute, tokens a second, 429 rate, dollars so far, time to go.

        What the ledger answered cost no time and is in none of the rates: of what this run was
        answered, the share that is accepted is taken to be that of all.
        """
        fresh = max(self.done - traffic.reused, 0)
        rate = self.accepted / self.done * fresh * 60 / traffic.seconds if self.done else 0.0
        left = (self.total - self.done) * traffic.seconds / fresh if fresh else None
        eta = "n/a" if left is None else f"{int(left) // 3600}h{int(left) % 3600 // 60:02d}m"
        return (
            f"{self.what} {self.done}/{self.total} | accepted {self.accepted} ({rate:.1f}/min) | "
            f"{traffic.completion_tokens / traffic.seconds:.0f} tok/s | "
            f"429 {traffic.throttled_share:.1%} | {dollars(ledger.spent)} | eta {eta}"
            f"{f' | {self.note}' if self.note else ''}"
        )


async def ask_server(
    server: Server,
    sending: Sending,
    ledger: Ledger,
    requests: Iterable[Request],
    on_outcome: Callable[[int, Outcome], bool],
    redact: Redactor,
    progress: Progress,
) -> tuple[Traffic, str]:
    """Put requests to a server; see `Asker.ask_all`.

    Returns:
        What was sent and came back, and why asking ended early ("" when it did not).

    Raises:
        RunError: no request can succeed, or the server is gone; the answers so far are kept.
    """
    if sending.batch_api.is_used:
        return await _ask_batches(server, sending, ledger, requests, on_outcome, redact, progress)
    limiter = Limiter(
        requests_per_minute=sending.requests_per_minute,
        tokens_per_minute=sending.tokens_per_minute,
        max_in_flight=sending.in_flight,
    )
    client = Client(
        server.base,
        server.key,
        server.price,
        redact,
        deadline=sending.deadline,
        connections=sending.in_flight,
    )
    async with client:
        asker = Asker(client, ledger, limiter, sending.retries)
        async with _shown(progress, asker.traffic, ledger):
            await asker.ask_all(requests, sending.in_flight, on_outcome)
    return asker.traffic, asker.cap_message


async def _ask_batches(
    server: Server,
    sending: Sending,
    ledger: Ledger,
    requests: Iterable[Request],
    on_outcome: Callable[[int, Outcome], bool],
    redact: Redactor,
    progress: Progress,
) -> tuple[Traffic, str]:
    """The same through the Batch API."""

    def say(text: str) -> None:
        progress.note = text

    client = BatchClient(server.base, server.key, redact, deadline=sending.deadline)
    reader = AnswerReader(server.price, redact)
    async with client:
        runner = BatchRunner(
            client, reader, ledger, sending.retries, sending.batch_api, server.model, say
        )
        batcher = Batcher(runner)
        async with _shown(progress, batcher.traffic, ledger):
            await batcher.ask_all(requests, on_outcome)
    return batcher.traffic, batcher.cap_message


@asynccontextmanager
async def _shown(progress: Progress, traffic: Traffic, ledger: Ledger) -> AsyncIterator[None]:
    """Show the progress line meanwhile."""
    show = asyncio.create_task(_show(progress, traffic, ledger))
    try:
        yield
    finally:
        show.cancel()
        with suppress(asyncio.CancelledError):
            await show


async def _show(progress: Progress, traffic: Traffic, ledger: Ledger) -> None:
    """Print the progress line now and then: in place on a terminal, else as lines of a log."""
    terminal = sys.stderr.isatty()
    begin, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    try:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if terminal else LOG_SECONDS)
            print(begin + progress.line(traffic, ledger), end=end, file=sys.stderr, flush=True)
    finally:
        print(begin + progress.line(traffic, ledger), file=sys.stderr, flush=True)


def traffic_report(traffic: Traffic, ledger: Ledger) -> dict[str, object]:
    """What a report says about a run: requests, failures, tokens, dollars."""
    return {
        "requests_sent": traffic.sent,
        "answered": traffic.answered,
        "reused": traffic.reused,
        "failures": dict(traffic.failures),
        "batches": dict(+traffic.batch),
        "seconds": round(traffic.seconds, 3),
        "ledger_prompt_tokens": ledger.prompt_tokens,
        "ledger_completion_tokens": ledger.completion_tokens,
        "ledger_lost_requests": ledger.lost,
        "ledger_dollars": ledger.spent / 1e9,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


REPORT_NAME = "report.json"


@dataclass(frozen=True)
class Estimate:
    """What a plan can cost at most.

    Attributes:
        samples: entries of the plan.
        answered: of them in the ledger already.
        prompt_tokens: of the others.
        completion_tokens: of the others, at most.
        nano: cost of the others at most, in 1e-9 dollars.
    """

    samples: int
    answered: int
    prompt_tokens: int
    completion_tokens: int
    nano: int
