"""The ledger: what was asked, answered and paid, in an append-only file that survives a kill.

One JSON object a line, flushed to the disk (fsync) before anything is built on it:

    {"kind": "reserve", "request": KEY, "nano": N}   before a request that costs money is sent
    {"kind": "answer", "request": KEY, "nano": N, …} the answer; replaces the reservation
    {"kind": "free", "request": KEY, "reason": …}    the server refused: nothing was billed
    {"kind": "lost", "request": KEY, "nano": N, …}   no answer came, but it may have been billed
    {"kind": "batch", "request": TAG, "step": …}     see `batch_journal.py`

KEY is the SHA-256 of model, prompt and parameters, so that a prompt is paid and stored once,
whatever run asks for it. A reservation is the most that a request can cost. One that a killed run
left open counts as spent, so that the cap holds across kills; those of a batch stay reserved until
the batch is closed, by whatever run. The last line, half-written when the
process was killed, is cut off.
"""

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.llm.batch_journal import Member, OpenBatch, apply_batch_line
from data_pipeline.llm.prices import dollars
from data_pipeline.llm.thoughts import without_thoughts
from data_pipeline.records.jsonl import MAX_LINE_BYTES, open_jsonl, read_lines
from megaphi.durable import open_locked
from megaphi.errors import RunError


class CostCapReached(Exception):
    """The next request could cost more than the cap leaves."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered to one request.

    Attributes:
        content: the text; None when there is none that can be used.
        finish_reason: `stop`, `length`, …; "" when the server gave none.
        problem: why the content cannot be used, a short fixed word; None when it can.
        served_model: the name by which the server calls its model.
        prompt_tokens: as the server counted, or the bound where it gave no count.
        completion_tokens: likewise.
        nano: cost in 1e-9 dollars.
    """

    content: str | None
    finish_reason: str
    problem: str | None
    served_model: str
    prompt_tokens: int
    completion_tokens: int
    nano: int

    @property
    def text(self) -> str | None:
        """The content without the model's thoughts; None when nothing of it can be used."""
        text = None if self.problem or self.content is None else without_thoughts(self.content)
        return text if text and text.strip() else None

    @property
    def flaw(self) -> str:
        """Why there is no `text`, a short fixed word."""
        if self.problem is None and self.content and without_thoughts(self.content) is None:
            return "thoughts"
        return self.problem or "no_content"


class Ledger:
    """One ledger file, locked against a second process.

    Args:
        path: the file; made when missing.
        max_nano: cap on the sum of all that the file records, in 1e-9 dollars; None for none.

    Attributes:
        spent: sum of answers and lost requests, in 1e-9 dollars.
        reserved: sum of the reservations of requests under way.
        lost: number of requests whose answer never came.
        prompt_tokens: sum over the answers.
        completion_tokens: likewise.
        batches: those that are not closed, by tag.

    Raises:
        RunError: another process has it open, or a line is damaged.
    """

    def __init__(self, path: Path, max_nano: int | None = None) -> None:
        self.path = path
        self._max = max_nano
        self.spent = self.reserved = self.lost = 0
        self.prompt_tokens = self.completion_tokens = 0
        self._places: dict[str, tuple[int, int]] = {}  # answer lines by request: offset, length
        self._open: dict[str, int] = {}  # reservations by request
        self.batches: dict[str, OpenBatch] = {}
        self._buffer = b""
        self._appended = self._synced = 0
        self._flushing = asyncio.Lock()
        self._settled = asyncio.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open_locked(path)
        except BlockingIOError:
            raise RunError(f"{path}: another process is using the ledger; wait for it") from None
        try:
            self._size = self._replay()
        except BaseException:
            self._file.close()
            raise
        for batch in list(self.batches.values()):
            if batch.step == "planned":  # nothing of it was started
                self._append_batch(batch.tag, "closed")
        kept = {key for batch in self.batches.values() for key in batch.members}
        self.reserved = sum(self._open.values())
        for request in [request for request in self._open if request not in kept]:
            self.lose_later(request, "killed")
        self._flush_now()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: str) -> bool:
        return request in self._places

    def _replay(self) -> int:
        """Read the file; return its length after cutting off a half-written last line."""
        end = 0
        with open_jsonl(self.path) as stream:
            for offset, line in read_lines(stream):
                where = f"{self.path}: byte {offset}"
                if line is None:
                    raise RunError(f"{where}: a line longer than {MAX_LINE_BYTES} bytes")
                whole = offset + len(line) + 1 <= os.fstat(self._file.fileno()).st_size
                try:
                    if not whole:
                        raise ValueError("no line end")
                    self._apply(json.loads(line), offset, len(line))
                except (ValueError, KeyError, TypeError) as error:
                    if stream.read(1):
                        raise RunError(
                            f"{where}: not a line of a ledger ({error}); restore the file from a "
                            "copy, or delete the line and pay for its answer again"
                        ) from None
                    break
                end = offset + len(line) + 1
        self._file.truncate(end)
        return end

    def _apply(self, entry: dict[str, Any], offset: int, length: int) -> None:
        kind, request = entry["kind"], entry["request"]
        if kind == "batch":
            self._apply_batch(entry)
            return
        reserved = self._open.pop(request, 0)
        if kind == "reserve":
            # The process that made an older reservation of the same request was killed twice over.
            self.spent += reserved
            self._open[request] = int(entry["nano"])
        elif kind == "answer":
            self._count(Answer(**entry["answer"]))
            self._places[request] = (offset, length)
        elif kind == "lost":
            self.spent += int(entry["nano"])
            self.lost += 1
        elif kind != "free":
            raise ValueError(f"unknown kind {kind!r}")

    def _apply_batch(self, entry: dict[str, Any]) -> None:
        batch = apply_batch_line(self.batches, entry)
        for key, member in batch.members.items():
            if entry["step"] == "planned":
                self._open[key] = member.nano
            elif entry["step"] == "closed":
                self._open.pop(key, None)

    def _count(self, answer: Answer) -> None:
        self.spent += answer.nano
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    def answer(self, request: str) -> Answer | None:
        """The stored answer of a request, read from the file; None when there is none.

        Raises:
            RunError: the file has changed underneath.
        """
        place = self._places.get(request)
        if place is None:
            return None
        line = os.pread(self._file.fileno(), place[1], place[0])
        try:
            return Answer(**json.loads(line)["answer"])
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{self.path}: byte {place[0]}: changed while it was in use") from None

    async def reserve(self, request: str, nano: int) -> None:
        """Set aside the most that a request can cost, before it is sent.

        Where the cap leaves too little, waits for requests under way, which mostly cost less than
        was set aside for them.

        Raises:
            CostCapReached: the cap leaves too little, and nothing is under way.
        """
        while not self.has_room(nano):
            if not self._open:
                raise self.cap_reached(nano)
            self._settled.clear()
            await self._settled.wait()
        self._open[request] = nano
        self.reserved += nano
        if nano:
            self._append("reserve", request, nano=nano)
            await self.flush()

    def has_room(self, nano: int) -> bool:
        """Whether the cap leaves so much."""
        return self._max is None or self.spent + self.reserved + nano <= self._max

    def cap_reached(self, nano: int) -> CostCapReached:
        """What to raise where it does not."""
        assert self._max is not None
        return CostCapReached(
            f"{dollars(self.spent)} are spent, and the next request may cost {dollars(nano)}: "
            f"the cap is {dollars(self._max)}"
        )

    async def plan_batch(
        self, tag: str, server: str, model: str, members: Mapping[str, Member]
    ) -> None:
        """Reserve all requests of a batch, which fit, before anything of it is sent."""
        assert not any(key in self._open or key in self._places for key in members)
        values = {key: [m.nano, m.prompt, m.completion] for key, m in members.items()}
        self.reserved += sum(member.nano for member in members.values())
        await self.note_batch(tag, "planned", server=server, model=model, members=values)

    async def note_batch(self, tag: str, step: str, **fields: object) -> None:
        """Journal a step of a batch; the last one frees what is still open of it."""
        if step == "closed":
            for key in self.batches[tag].members:
                if key in self._open:
                    self._settle(key)
        self._append_batch(tag, step, **fields)
        await self.flush()

    def is_open(self, request: str) -> bool:
        """Whether a request is reserved and has no outcome yet."""
        return request in self._open

    def abandon_batches(self) -> int:
        """Count the open requests of all batches as lost; returns how many there were."""
        count = 0
        for tag, batch in list(self.batches.items()):
            for key in filter(self.is_open, batch.members):
                self.lose_later(key, "abandoned")
                count += 1
            self._append_batch(tag, "closed")
        self._flush_now()
        return count

    def _append_batch(self, tag: str, step: str, **fields: object) -> None:
        fields = {"step": step, "time": time.time(), **fields}
        self._append("batch", tag, **fields)
        self._apply_batch({"request": tag, **fields})

    def _settle(self, request: str) -> int:
        nano = self._open.pop(request)
        self.reserved -= nano
        self._settled.set()
        return nano

    async def store(self, request: str, answer: Answer) -> None:
        """Record the answer of a reserved request."""
        place = self._put_answer(request, answer)
        await self.flush()
        self._places[request] = place

    async def store_many(self, answers: Mapping[str, Answer]) -> None:
        """The same of several, with one wait for the disk."""
        places = {key: self._put_answer(key, answer) for key, answer in answers.items()}
        await self.flush()
        self._places.update(places)

    def _put_answer(self, request: str, answer: Answer) -> tuple[int, int]:
        assert request not in self._places, "an answer is stored once"
        self._settle(request)
        self._count(answer)
        return self._append("answer", request, nano=answer.nano, answer=asdict(answer))

    async def free(self, request: str, reason: str) -> None:
        """Record that a reserved request was refused and not billed."""
        if self._settle(request):
            self._append("free", request, reason=reason)
            await self.flush()

    async def lose(self, request: str, reason: str) -> None:
        """Record that no answer came to a reserved request, which may have been billed."""
        self.lose_later(request, reason)
        if self._buffer:
            await self.flush()

    def lose_later(self, request: str, reason: str) -> None:
        """The same; `flush` waits for the disk."""
        nano = self._settle(request)
        self.spent += nano
        self.lost += 1
        if nano:
            self._append("lost", request, nano=nano, reason=reason)

    def _append(self, kind: str, request: str, **fields: object) -> tuple[int, int]:
        """Put a line in the buffer; returns where it will be in the file."""
        line = json.dumps({"kind": kind, "request": request, **fields}).encode("ascii")
        place = (self._size, len(line))
        self._buffer += line + b"\n"
        self._size += len(line) + 1
        self._appended += 1
        return place

    async def flush(self) -> None:
        """Wait until what was appended is on the disk; concurrent callers share one fsync."""
        mine = self._appended
        async with self._flushing:
            if self._synced >= mine:
                return
            data, self._buffer = self._buffer, b""
            upto = self._appended
            await asyncio.to_thread(self._write, data)
            self._synced = upto

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _flush_now(self) -> None:
        if self._buffer:
            data, self._buffer = self._buffer, b""
            self._write(data)
            self._synced = self._appended

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        self._flush_now()
        self._file.close()
