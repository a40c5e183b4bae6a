"""The files and batches of an OpenAI-compatible server (`/files`, `/batches`).

The server counts as hostile here too: ids are checked before they are kept or put into a URL, and
a file that is downloaded is bounded in bytes and time and read line by line.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import httpx2
import openai

from data_pipeline.llm.connection import CallError, Connection, quote
from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import MAX_BODY_BYTES, BaseUrl
from data_pipeline.records.record import Json
from megaphi.errors import RunError

ENDPOINT: Final = "/v1/chat/completions"
TAG = "megaphi"  # key of a batch's metadata
MAX_LINE_BYTES = MAX_BODY_BYTES
MAX_FILE_BYTES = 2**34
SLOWEST = 20_000  # bytes a second; a file that comes more slowly is given up
PAGES = 200  # of 100 batches, that are searched for ours
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "expired", "cancelled", "failed")
_ID = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """What the server says of a batch.

    Attributes:
        id: its id.
        status: one of `RUNNING` or `ENDED`; a word that is unknown counts as `in_progress`.
        output_file: id of the file of answers, "" when there is none.
        error_file: likewise, of failures.
        errors: (code, message) of why the batch as a whole was refused.
        completed: requests done, for the progress line.
    """

    id: str
    status: str
    output_file: str
    error_file: str
    errors: tuple[tuple[str, str], ...]
    completed: int


class BatchClient:
    """Files and batches of one server; used as an asynchronous context manager.

    Args:
        base: where it is.
        key: the API key.
        redact: keeps keys out of what the server sends back.
        deadline: seconds for one answer; uploads and downloads get more, by their size.
    """

    def __init__(
        self, base: BaseUrl, key: Secret | None, redact: Redactor, *, deadline: float
    ) -> None:
        self.base = base
        self._redact = redact
        self._connection = Connection(base, key, redact, deadline=deadline)
        self._downloads = Connection(base, key, redact, deadline=deadline, max_body=MAX_FILE_BYTES)

    async def __aenter__(self) -> "BatchClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._connection.close()
        await self._downloads.close()

    def run_error(self, error: CallError) -> RunError:
        """See `Connection.run_error`."""
        return self._connection.run_error(error)

    async def upload(self, tag: str, stream: BinaryIO) -> str:
        """Upload a file of requests; returns its id.

        Raises:
            CallError, RunError: see `Connection.call`.
        """
        size = stream.seek(0, 2)
        stream.seek(0)
        answer = await self._call(
            lambda client: client.files.with_raw_response.create(
                file=(f"{tag}.jsonl", stream), purpose="batch"
            ),
            self._connection.deadline + size / SLOWEST,
        )
        return self._id(answer.get("id"))

    async def create(self, tag: str, file: str) -> BatchState:
        """Start a batch: from here on it costs money.

        Raises:
            CallError, RunError: see `Connection.call`; it may have been started all the same.
        """
        answer = await self._call(
            lambda client: client.batches.with_raw_response.create(
                input_file_id=file,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={TAG: tag},
                extra_headers={"Idempotency-Key": tag},
            )
        )
        return self._state(answer)

    async def state(self, batch: str) -> BatchState:
        """How a batch is doing.

        Raises:
            CallError, RunError: see `Connection.call`.
        """
        return self._state(
            await self._call(lambda client: client.batches.with_raw_response.retrieve(batch))
        )

    async def cancel(self, batch: str) -> BatchState:
        """Ask the server to end a batch.

        Raises:
            CallError, RunError: see `Connection.call`.
        """
        return self._state(
            await self._call(lambda client: client.batches.with_raw_response.cancel(batch))
        )

    async def find(self, tag: str, since: float) -> BatchState | None:
        """The batch of a tag, None when the server has none.

        Args:
            tag: in its metadata.
            since: seconds since 1970; the list, newest first, is read a day further back.

        Raises:
            CallError, RunError: see `Connection.call`; the list does not end.
        """
        after: dict[str, str] = {}
        for _ in range(PAGES):
            page = await self._call(
                lambda client, after=after: client.batches.with_raw_response.list(  # type: ignore[misc]
                    limit=100, **after
                )
            )
            rows = page.get("data")
            rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            for row in rows:
                metadata = row.get("metadata")
                if isinstance(metadata, dict) and metadata.get(TAG) == tag:
                    return self._state(row)
            times = [row.get("created_at") for row in rows]
            old = all(type(time) is int and time < since - 86_400 for time in times)
            if page.get("has_more") is not True or old:
                return None
            after = {"after": self._id(rows[-1].get("id"))}
        raise CallError("malformed", f"the list of batches has more than {PAGES} pages")

    async def download(
        self,
        file: str,
        max_bytes: int,
        on_lines: Callable[[list[bytes | None]], Awaitable[None]],
    ) -> bool:
        """Read a file, handing its lines over as they come; None for one that is too long.

        Args:
            file: its id.
            max_bytes: no more is read.
            on_lines: called with the whole lines of each piece that arrives.

        Returns:
            Whether the file ended before `max_bytes`.

        Raises:
            CallError, RunError: see `Connection.call`; the connection broke, or was too slow.
        """
        loop = asyncio.get_running_loop()
        started, received = loop.time(), 0
        lines = LineCutter()
        files = self._downloads.openai.files.with_streaming_response
        try:
            async with asyncio.timeout(self._downloads.deadline) as limit:
                async with files.content(file) as response:
                    pieces: AsyncIterator[bytes] = response.iter_bytes()
                    async for piece in pieces:
                        received += len(piece)
                        if received > max_bytes:
                            return False
                        seconds = self._downloads.deadline + received / SLOWEST
                        limit.reschedule(started + seconds)
                        await on_lines(lines.feed(piece))
        except TimeoutError:
            detail = f"{received} bytes in {loop.time() - started:.0f} s, then no more"
            raise CallError("timeout", detail) from None
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise self._downloads.error(error) from None
        await on_lines(lines.end())
        return True

    async def _call(
        self,
        send: Callable[[openai.AsyncOpenAI], Awaitable[Any]],
        deadline: float | None = None,
    ) -> dict[str, Any]:
        """Make a call that is answered with a JSON object."""
        body = await self._connection.call(send, deadline)
        try:
            answer = json.loads(body.decode("utf-8"))
            if not isinstance(answer, dict):
                raise ValueError(f"{type(answer).__name__} instead of an object")
        except (ValueError, RecursionError) as error:
            detail = quote(str(error), self._redact)
            raise CallError("malformed", detail, billed=True) from None
        return answer

    def _id(self, value: Json) -> str:
        """An id of the server's making, fit for a ledger and a URL.

        Raises:
            CallError: it is none.
        """
        if not isinstance(value, str) or not _ID.fullmatch(value) or self._redact.finds(value):
            raise CallError("malformed", "the server gave no proper id", billed=True)
        return value

    def _state(self, answer: dict[str, Any]) -> BatchState:
        status = answer.get("status")
        counts, errors = answer.get("request_counts"), answer.get("errors")
        completed = counts.get("completed") if isinstance(counts, dict) else 0
        rows = errors.get("data") if isinstance(errors, dict) else None
        objects = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        output, failures = answer.get("output_file_id"), answer.get("error_file_id")
        return BatchState(
            id=self._id(answer.get("id")),
            status=status if status in RUNNING + ENDED else "in_progress",
            output_file="" if output is None else self._id(output),
            error_file="" if failures is None else self._id(failures),
            errors=tuple(
                (
                    quote(str(row.get("code")), self._redact),
                    quote(str(row.get("message")), self._redact),
                )
                for row in objects[:5]
            ),
            completed=completed if type(completed) is int else 0,
        )


class LineCutter:
    """Cuts pieces into lines; one longer than `MAX_LINE_BYTES` becomes None."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, piece: bytes) -> list[bytes | None]:
        """The lines that this piece completes."""
        if b"\n" not in piece:
            self._keep(self._rest + piece)
            return []
        first, *lines = (self._rest + piece).split(b"\n")
        found: list[bytes | None] = [None if self._skipping else first, *lines[:-1]]
        self._skipping = False
        self._keep(lines[-1])
        return [line for line in found if line is None or line.strip()]

    def _keep(self, rest: bytes) -> None:
        self._skipping |= len(rest) > MAX_LINE_BYTES
        self._rest = b"" if self._skipping else rest

    def end(self) -> list[bytes | None]:
        """What stands behind the last line feed."""
        if self._skipping:
            return [None]
        return [self._rest] if self._rest.strip() else []
