"""Asks many requests through a Batch API: files of requests, answers within a day, for less.

The requests are taken in waves of a few batches. Each batch is journalled in the ledger
(`batch_journal.py`) before anything of it is sent, with all that it can cost, so that a run that is
killed anywhere finds what it has started and pays for nothing twice. When a batch has ended, its
rows are merged into the ledger by request; what is missing or failed goes into the next round.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable

from data_pipeline.llm.ask import BILLED_ATTEMPTS, OUTAGE, PARAMETERS, Failure, Outcome, Traffic
from data_pipeline.llm.batch.client import ENDPOINT
from data_pipeline.llm.batch.run import MAX_BYTES, TOO_MUCH, BatchRunner
from data_pipeline.llm.batch_journal import Member
from data_pipeline.llm.completion import Request
from data_pipeline.llm.connection import CallError
from megaphi.errors import RunError

REFUSALS = 24  # of rounds, for being too many tokens at a time
LONGEST_WAIT = 3600.0  # seconds, after such a refusal


class Batcher:
    """Puts requests to one model of one server.

    Args:
        runner: runs the batches.

    Attributes:
        cap_message: why asking ended early, "" when it did not.
    """

    def __init__(self, runner: BatchRunner) -> None:
        self._runner = runner
        self._batching = runner.batching
        self._ledger = runner.ledger
        self._base = runner.client.base
        self._refusals = 0
        self._last_error = ""
        self.cap_message = ""

    @property
    def traffic(self) -> Traffic:
        """What was sent and came back."""
        return self._runner.traffic

    async def ask_all(
        self, requests: Iterable[Request], on_outcome: Callable[[int, Outcome], bool]
    ) -> bool:
        """Ask, and hand each outcome over in the order of the requests; see `Asker.ask_all`.

        Raises:
            RunError: no request can succeed, or the server is gone.
        """
        await self._runner.recover()
        wave: list[Request] = []
        number = fresh = size = 0
        most, most_bytes = (
            limit * self._batching.batches for limit in (self._batching.batch_requests, MAX_BYTES)
        )
        stream = iter(requests)
        while True:
            request = next(stream, None)
            if request is not None:
                wave.append(request)
                if request.key not in self._ledger:
                    fresh += 1
                    size += len(self._line(request))
                if fresh and fresh < most and size < most_bytes and len(wave) < 2 * most:
                    continue
            failures = await self._ask_wave(wave) if fresh else {}
            for asked in wave:
                outcome = failures.get(asked.key) or self._ledger.answer(asked.key)
                if outcome is None:
                    return False
                self.traffic.reused += (
                    asked.key not in failures and asked.key not in self._runner.answered
                )
                if not on_outcome(number, outcome):
                    return True
                number += 1
            if request is None:
                break
            wave, fresh, size = [], 0, 0
            self._runner.answered.clear()
        if self._last_error and not self.traffic.answered + self.traffic.reused:
            raise RunError(
                f"{self._base.url}: not one request was answered, the last failed with "
                f"{self._last_error}"
            )
        return True

    def _line(self, request: Request) -> bytes:
        """The line of a file of requests (JSON)."""
        row = {"custom_id": request.key, "method": "POST", "url": ENDPOINT}
        line = json.dumps(row | {"body": request.body(self._base)}, ensure_ascii=False)
        return line.encode("utf-8") + b"\n"

    async def _ask_wave(self, wave: list[Request]) -> dict[str, Failure]:
        """Ask until each request has an answer, or a failure, or the cap is reached."""
        waiting = {r.key: r for r in wave if r.key not in self._ledger}
        asked = len(waiting)
        failures: dict[str, Failure] = {}
        tries: Counter[str] = Counter()
        billed: Counter[str] = Counter()
        while waiting:
            files = self._cut(waiting.values())
            if not files:
                nano = min(self._most(request).nano for request in waiting.values())
                self.cap_message = str(self._ledger.cap_reached(nano))
                break
            found = await self._ask_round(files)
            for key in [key for key in waiting if key in self._ledger]:
                del waiting[key]
            final = next((error for error in found.values() if error.final), None)
            if final is not None:
                raise self._runner.client.run_error(final)
            for key, error in found.items():
                tries[key] += error.reason not in TOO_MUCH
                billed[key] += error.billed
                if (
                    not error.retry
                    or tries[key] >= self._batching.batch_rounds
                    or billed[key] >= BILLED_ATTEMPTS
                ):
                    failures[key] = Failure(error.reason, str(error))
                    self._last_error = str(error)
                    del waiting[key]
            if any(error.reason in TOO_MUCH for error in found.values()):
                await self._wait_for_room()
        if len(failures) == asked >= OUTAGE:
            refused = self._last_error.startswith(("http_400", "http_422"))
            advice = f"; {PARAMETERS}" if refused else ""
            raise RunError(
                f"{self._base.url}: none of {asked} requests was answered, the last failed "
                f"with {self._last_error}; answers so far are kept, run again to go on{advice}"
            )
        return failures

    async def _wait_for_room(self) -> None:
        """The server has refused a batch for what is enqueued already: wait, longer each time.

        Raises:
            RunError: it does so again and again.
        """
        self._refusals += 1
        if self._refusals >= REFUSALS:
            raise RunError(
                f"{self._base.url}: batches were refused {self._refusals} times for their "
                "number of tokens; lower `batch_requests` or `batches` and run again"
            )
        wait = min(self._batching.poll_interval * 2.0**self._refusals, LONGEST_WAIT)
        await asyncio.sleep(wait * random.uniform(1, 1.1))

    def _most(self, request: Request) -> Member:
        nano = self._runner.reader.price.nano_dollars(request.prompt_bound, request.max_tokens)
        return Member(nano, request.prompt_bound, request.max_tokens)

    def _cut(self, requests: Iterable[Request]) -> list[list[Request]]:
        """Divide requests into files, as far as the cap allows and as are asked at a time."""
        files: list[list[Request]] = []
        size = nano = 0
        for request in requests:
            line = len(self._line(request))
            nano += self._most(request).nano
            if not self._ledger.has_room(nano):
                break
            full = not files or len(files[-1]) >= self._batching.batch_requests
            if full or size + line > MAX_BYTES:
                if len(files) == self._batching.batches:
                    break
                files.append([])
                size = 0
            files[-1].append(request)
            size += line
        return files

    async def _run(self, requests: list[Request]) -> dict[str, CallError]:
        members = {request.key: self._most(request) for request in requests}
        return await self._runner.run(members, lambda: map(self._line, requests))

    async def _ask_round(self, files: list[list[Request]]) -> dict[str, CallError]:
        """Run batches side by side; returns the requests that were not answered, and why."""
        errors: dict[str, CallError] = {}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(requests)) for requests in files]
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        for task in tasks:
            errors |= task.result()
        return errors
