"""One reader for each kind of source: what is in a file, what identifies it, what comes out of it.

`READERS` is the only place that knows which reader a kind has; `sources.ENDINGS` says which names
are of that kind. A new format is an entry in each and a reader here.
"""

import hashlib
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.ingest.archive_members import ArchiveBomb, Member
from data_pipeline.ingest.archives import DAMAGE, read_members
from data_pipeline.ingest.code_contests import COLUMNS
from data_pipeline.ingest.compressed import decompressed
from data_pipeline.ingest.documents import TextRules, python_outcome, row_outcome
from data_pipeline.ingest.rows import (
    TEXT_FIELDS,
    Row,
    Span,
    hub_rows,
    jsonl_rows,
    line_spans,
    parquet_rows,
    row_group_spans,
)
from data_pipeline.ingest.sources import Kind, SourceFile, kind_of, printable, read_bytes
from data_pipeline.records.jsonl import READ_BYTES
from data_pipeline.records.record import Json, Record, Reject, digest, reject_at
from data_pipeline.records.text import DocumentError
from megaphi.durable import file_sha256
from megaphi.errors import RunError

MAX_MEMBER_BYTES = 4 * 2**30  # of a data file in an archive
_LINE_KINDS = (".jsonl", ".ndjson")  # whose bytes can be entered in the middle

Outcomes = Iterator[Record | Reject]
Columns = Sequence[str] | None  # those of a Parquet file that are wanted; None for all


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file, or a piece of one, is read.

    Attributes:
        rules: of the texts.
        field: text field of rows; None takes the first of `TEXT_FIELDS` that a row has.
        is_contest: the rows are problems of programming contests.
        span: the piece, None for the whole.
        describe: called once with the bytes and the SHA-256 of a file, for the manifest.
    """

    rules: TextRules
    field: str | None
    is_contest: bool = False
    span: Span | None = None
    describe: Callable[[int, str], None]


class Reader:
    """What all readers can do; the methods are those of a file of rows that is read at once."""

    def rows(self, file: SourceFile, span: Span | None, columns: Columns) -> Iterator[Row]:
        """The rows of a file, or of a piece of one; no rows for a reader of something else.

        Raises:
            OSError: it cannot be read on.
        """
        return iter(())

    def member_rows(self, stream: BinaryIO, where: str) -> Iterator[Row]:
        """The rows of a member of an archive."""
        raise AssertionError(f"{where}: no file of rows")

    def holds_posts(self, file: SourceFile) -> bool:
        """Whether the file is a dump of Stack Exchange."""
        return False

    def spans(self, file: SourceFile) -> list[Span | None]:
        """The pieces in which a large file is read, in order; [None] for one that is read whole."""
        return [None]

    def identity(self, file: SourceFile, max_bytes: int) -> tuple[int, str]:
        """Bytes and SHA-256 of the content.

        Raises:
            OSError, DocumentError: it cannot be read.
        """
        return file.size, file_sha256(Path(file.path))

    def outcomes(self, file: SourceFile, reading: Reading) -> Outcomes:
        """The record or reject of each document."""
        if reading.span is None or reading.span.start == 0:
            reading.describe(*identity(file, reading.rules.max_bytes))
        columns = COLUMNS if reading.is_contest else None
        rows = self.rows(file, reading.span, columns)
        try:
            yield from _row_outcomes(rows, reading.rules, reading.field, reading.is_contest)
        except OSError as error:
            yield reject_at(reading.rules.source, file.name, "unreadable", str(error))

    def member_outcomes(self, member: Member, where: str, reading: Reading) -> Outcomes:
        """The record or reject of each document of a member of an archive."""
        assert member.stream is not None
        rows = self.member_rows(member.stream, where)
        return _row_outcomes(rows, reading.rules, reading.field, is_contest=False)


def _row_outcomes(
    rows: Iterator[Row], rules: TextRules, field: str | None, is_contest: bool
) -> Outcomes:
    """Rows as records or rejects; without a field, the first of `TEXT_FIELDS` that a row has."""
    for position, row in rows:
        if isinstance(row, tuple):
            yield reject_at(rules.source, position, *row)
        elif is_contest:
            yield row_outcome(position, row, None, rules)
        else:
            there = field or next((f for f in TEXT_FIELDS if f in row), TEXT_FIELDS[0])
            yield row_outcome(position, row, there, rules)


def identity(file: SourceFile, max_bytes: int) -> tuple[int, str]:
    """What a file contributes to the identity of its source: its bytes and SHA-256.

    Files that cannot be read count by their size.
    """
    try:
        return READERS[file.kind].identity(file, max_bytes)
    except (OSError, DocumentError):
        return file.size, ""


class PythonReader(Reader):
    """A source file: one document."""

    def identity(self, file: SourceFile, max_bytes: int) -> tuple[int, str]:
        """Bytes and SHA-256 of what was read."""
        data = _load(file, max_bytes)
        return len(data), hashlib.sha256(data).hexdigest()

    def outcomes(self, file: SourceFile, reading: Reading) -> Outcomes:
        """One outcome; the file is read once, for its digest and its text."""
        rules = reading.rules
        try:
            data = _load(file, rules.max_bytes)
        except DocumentError as error:
            reading.describe(file.size, "")
            yield reject_at(rules.source, file.name, error.reason, error.detail)
            return
        reading.describe(len(data), hashlib.sha256(data).hexdigest())
        yield python_outcome(data, file.name, file.inside, rules)

    def member_outcomes(self, member: Member, where: str, reading: Reading) -> Outcomes:
        """One outcome."""
        assert member.stream is not None
        rules = reading.rules
        data = _read_up_to(member.stream, rules.max_bytes + 1)
        if len(data) > rules.max_bytes:
            detail = f"more than {rules.max_bytes} bytes"
            yield reject_at(rules.source, where, "too_large", detail)
        else:
            yield python_outcome(data, where, printable(member.name), rules)


def _load(file: SourceFile, max_bytes: int) -> bytes:
    """The bytes of a source file.

    Raises:
        DocumentError: it cannot be read or is too large.
    """
    try:
        return read_bytes(file, max_bytes)
    except OSError as error:
        raise DocumentError("unreadable", str(error.strerror or error)) from None
    except OverflowError:
        raise DocumentError("too_large", f"{file.size} bytes, above {max_bytes}") from None


def _read_up_to(stream: BinaryIO, limit: int) -> bytes:
    """The first bytes of a raw stream, whose `read` may give fewer than asked for."""
    blocks = []
    while limit > 0 and (block := stream.read(limit)):
        blocks.append(block)
        limit -= len(block)
    return b"".join(blocks)


class JsonLinesReader(Reader):
    """JSON lines, plain or compressed."""

    def spans(self, file: SourceFile) -> list[Span | None]:
        """Compressed files are read whole: they cannot be entered in the middle."""
        plain = file.path.lower().endswith(_LINE_KINDS)
        return line_spans(file.size) if plain else [None]

    def rows(self, file: SourceFile, span: Span | None, columns: Columns) -> Iterator[Row]:
        """The rows of its lines."""
        with open(file.path, "rb", buffering=READ_BYTES) as raw:
            stream = raw if span is not None else decompressed(raw, file.path)
            try:
                yield from jsonl_rows(stream, file.name, span)
            except (EOFError, zlib.error, lzma.LZMAError) as error:
                raise OSError(f"{file.path}: {error}") from None

    def member_rows(self, stream: BinaryIO, where: str) -> Iterator[Row]:
        """The rows of its lines."""
        return jsonl_rows(decompressed(stream, where), where)


class ParquetReader(Reader):
    """Parquet files, in which row groups can be read by themselves."""

    def spans(self, file: SourceFile) -> list[Span | None]:
        """A file whose footer cannot be read becomes a reject when it is opened again."""
        return row_group_spans(file.path, file.size)

    def rows(self, file: SourceFile, span: Span | None, columns: Columns) -> Iterator[Row]:
        """The rows of its groups."""
        return parquet_rows(file.path, file.name, span, columns)

    def member_rows(self, stream: BinaryIO, where: str) -> Iterator[Row]:
        """Parquet is read from its end: its bytes wait in a file without a name."""
        with tempfile.TemporaryFile() as copy:
            taken = 0
            while block := stream.read(2**20):
                taken += len(block)
                if taken > MAX_MEMBER_BYTES:
                    yield where, ("too_large", f"more than {MAX_MEMBER_BYTES} bytes")
                    return
                copy.write(block)
            copy.seek(0)
            yield from parquet_rows(cast(BinaryIO, copy), where)


class HubReader(Reader):
    """A data set of the Hugging Face hub, or one saved by `datasets`."""

    def rows(self, file: SourceFile, span: Span | None, columns: Columns) -> Iterator[Row]:
        """Half a data set for want of a network must not pass for all of it: that is a RunError."""
        try:
            yield from hub_rows(file)
        except OSError as error:
            raise RunError(f"{file.path}: stopped while it was being read: {error}") from None

    def identity(self, file: SourceFile, max_bytes: int) -> tuple[int, str]:
        """SHA-256 over the Arrow files of a saved data set; a name on the hub has none."""
        arrow = sorted(Path(file.path).rglob("*.arrow"))
        return file.size, digest(
            [[item.name, file_sha256(item)] for item in arrow]
        ) if arrow else ""


class PostsReader(Reader):
    """Posts.xml of the Stack Exchange dump, which `stackoverflow.read_posts` reads."""

    def holds_posts(self, file: SourceFile) -> bool:
        """Always."""
        return True


class ArchiveReader(Reader):
    """An archive of source files and files of rows."""

    def holds_posts(self, file: SourceFile) -> bool:
        """As a .7z archive of the dump does."""
        if not file.path.lower().endswith(".7z"):
            return False
        from data_pipeline.ingest.sevenzip import holds_posts

        return holds_posts(file.path)

    def outcomes(self, file: SourceFile, reading: Reading) -> Outcomes:
        """The outcomes of all members; damage in one is a reject, a bomb ends the archive."""
        reading.describe(*identity(file, reading.rules.max_bytes))
        source, where = reading.rules.source, file.name
        try:
            for member in read_members(file.path, file.size):
                where = f"{file.name}!{printable(member.name)}"
                if member.stream is None:
                    yield reject_at(source, where, member.reason, member.detail)
                else:
                    yield from self._read_member(member, where, reading)
                where = file.name
        except ArchiveBomb as error:
            yield reject_at(source, where, "archive_bomb", str(error))
        except OSError as error:
            yield reject_at(source, where, "unreadable", str(error))

    @staticmethod
    def _read_member(member: Member, where: str, reading: Reading) -> Outcomes:
        kind = kind_of(member.name)
        assert kind is not None, "members of other kinds are passed over"
        try:
            yield from READERS[kind].member_outcomes(member, where, reading)
        except (OSError, *DAMAGE) as error:
            detail = f"{type(error).__name__}: {error}"
            yield reject_at(reading.rules.source, where, "unreadable", detail)


READERS: dict[Kind, Reader] = {
    "python": PythonReader(),
    "jsonl": JsonLinesReader(),
    "parquet": ParquetReader(),
    "archive": ArchiveReader(),
    "posts": PostsReader(),
    "hub": HubReader(),
}


def first_row(file: SourceFile) -> tuple[str, dict[str, Json]] | None:
    """(position, row) of the first row of a file that is an object; None if there is none."""
    try:
        for position, row in READERS[file.kind].rows(file, None, None):
            if not isinstance(row, tuple):
                return position, row
    except OSError:  # a reject, when it is read
        pass
    return None
