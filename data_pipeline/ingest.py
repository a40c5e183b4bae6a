"""The first stage: raw files and rows become records, or rejects with a reason.

Every document read ends in exactly one of kept and rejected. The checks, in this order:

    not_regular_file  symbolic link, named pipe, device (never followed, never opened)
    unreadable        the file cannot be read, or a compressed file ends too early
    json              a JSONL line that is not JSON; the detail has the byte offset
    type              a row that is not an object, or a text that is not a string
    missing_field     a row without the text field
    too_large         more than `max_bytes`
    encoding          a declared PEP 263 encoding that is unknown or does not fit the bytes
    utf8              anything else that is not strict UTF-8
    nul, surrogate    characters that no source file holds and no tokenizer takes
    empty, too_small  nothing but white space; fewer than `min_bytes`
    long_word         more than 65,536 characters without white space

`long_word` bounds tokenization: byte-pair encoding is slower than linear in the length of a word
(0.8 s for 1 MB, 13 s for 4 MB), and such words are embedded data, not code.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from data_pipeline.engine import Stage, Tally, Work
from data_pipeline.records import Json, Record, Reject, digest, record_id
from data_pipeline.sources import (
    Source,
    SourceFile,
    content_sha256,
    find_source,
    find_text_field,
    printable,
    read_bytes,
    read_rows,
    reject_at,
)
from data_pipeline.text import LONG_WORD, DocumentError, check_text, decode_python

VERSION = "1"
SHARD_BYTES = 32 * 2**20  # small files are gathered to shards of this size
SHARD_FILES = 20_000
MAX_NESTING = 100  # of the other fields of a row
DEFAULT_MAX_BYTES = 2**20  # The Stack, too, drops files above 1 MB
NOTES = (
    "a UTF-8 byte order mark is dropped",
    "carriage return + line feed becomes line feed",
)

# Names of the same thing in The Stack (v1, v2), codeparrot and others -> ours.
_ALIASES = {
    "repo": ("repo", "max_stars_repo_name", "repo_name"),
    "path": ("path", "max_stars_repo_path", "file_path"),
    "revision": ("revision", "max_stars_repo_head_hexsha", "revision_id", "commit"),
    "license": ("license", "max_stars_repo_licenses", "detected_licenses", "licenses"),
    "lang": ("lang", "language"),
    "url": ("url",),
}
# Keys that later stages write, kept as they are when records come back through ingest.
_STAGE_KEYS = ("quality", "gen", "dup", "decon", "problem", "solution", "lineage")


Unit = tuple[int, SourceFile, str | None]  # index of the source, file, its text field


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What the output of ingest depends on, besides its sources.

    Attributes:
        source: label of the records.
        text_field: field of the text in rows; None takes the first of content, text, code.
        min_bytes: smallest text, UTF-8 bytes.
        max_bytes: largest text.
        limit: stop after this many documents read, kept or not; None reads all.
        exclude: patterns of names of files and folders that are not looked at.
    """

    source: str = "local"
    text_field: str | None = None
    min_bytes: int = 1
    max_bytes: int = DEFAULT_MAX_BYTES
    limit: int | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise ValueError(
                f"--min-bytes {self.min_bytes} --max-bytes {self.max_bytes}: "
                "must be 0 or more, the first not above the second"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: must be 1 or more")
        if not self.source or not self.source.isprintable():
            raise ValueError(f"--source {self.source!r}: must be a printable label")


@dataclass(frozen=True)
class IngestShard:
    """Consecutive files of the sources."""

    files: list[Unit]


def plan_ingest(arguments: Sequence[str], options: IngestOptions) -> tuple[Stage, Work]:
    """Find the sources and divide them into shards.

    Args:
        arguments: SOURCE arguments (`sources.find_source`), in the order of the output.
        options: the stage's options.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be used; the first row of a data file lacks the text field.
    """
    sources = [
        find_source(argument, name, options.exclude)
        for argument, name in zip(arguments, _source_names(arguments), strict=True)
    ]
    units: list[Unit] = []
    for index, source in enumerate(sources):
        for file in source.files:
            is_rows = file.kind != "python" and not file.refused
            field = find_text_field(file, options.text_field) if is_rows else None
            units.append((index, file, field))
    config = vars(options) | {"long_word": LONG_WORD}
    stage = Stage(name="ingest", version=VERSION, config=config, function=ingest_shard, notes=NOTES)
    work = Work(
        shards=[IngestShard(units)] if options.limit else _divide(units),
        fingerprint=[
            [index, file.name, file.size, file.mtime_ns, file.refused] for index, file, _ in units
        ],
        describe=lambda recorded: _describe(sources, [e for shard in recorded for e in shard]),
        identify=lambda: _describe(sources, [_digest(unit, options.max_bytes) for unit in units]),
    )
    return stage, work


def _source_names(arguments: Sequence[str]) -> list[str]:
    """The last part of each argument's path, numbered where two are equal."""
    names: list[str] = []
    for argument in arguments:
        base = os.path.basename(os.path.abspath(argument)) if os.path.exists(argument) else argument
        choices = itertools.chain([base], (f"{base}~{number}" for number in itertools.count(2)))
        names.append(next(name for name in choices if name not in names))
    return names


def _divide(units: list[Unit]) -> list[IngestShard]:
    """Gather consecutive files up to `SHARD_BYTES`; a larger file is a shard of its own."""
    shards: list[IngestShard] = []
    size = 0
    for unit in units:
        file_size = unit[1].size
        full = size + file_size > SHARD_BYTES or (shards and len(shards[-1].files) >= SHARD_FILES)
        if not shards or full:
            shards.append(IngestShard([]))
            size = 0
        shards[-1].files.append(unit)
        size += file_size
    return shards


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


def _digest(unit: Unit, max_bytes: int) -> list[Json]:
    """What a file contributes to the identity of its source: [source, name, bytes, SHA-256].

    Files that are refused unread count by their name and size.
    """
    index, file, _ = unit
    if file.refused:
        return [index, file.name, 0, ""]
    try:
        if file.kind == "python":
            return _bytes_digest(unit, _load(file, max_bytes))
        return [index, file.name, file.size, content_sha256(file)]
    except (OSError, DocumentError):
        return [index, file.name, file.size, ""]


def _bytes_digest(unit: Unit, data: bytes) -> list[Json]:
    return [unit[0], unit[1].name, len(data), hashlib.sha256(data).hexdigest()]


def _describe(sources: list[Source], entries: list[list[Json]]) -> list[dict[str, Json]]:
    """The manifest's inputs: one entry a source, its digest over the files' names and contents.

    A data set on the hub is identified by its name alone.
    """
    described = []
    for index, source in enumerate(sources):
        mine = [entry[1:] for entry in entries if entry[0] == index]
        described.append(
            {
                "path": printable(source.argument),
                "files": len(mine),
                "bytes": sum(entry[1] for entry in mine),
                "sha256": digest(mine),
            }
        )
    return described


def ingest_shard(
    shard: IngestShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: yield a record or a reject for each document of the shard."""
    options = IngestOptions(**{k: v for k, v in config.items() if k != "long_word"})
    for unit in shard.files:
        for outcome in _read_file(unit, options, tally):
            tally.records_in += 1
            yield outcome
            if tally.records_in == options.limit:
                return


def _read_file(unit: Unit, options: IngestOptions, tally: Tally) -> Iterator[Record | Reject]:
    _, file, field = unit
    if file.kind == "python" and not file.refused:
        yield _python_outcome(unit, options, tally)
        return
    tally.inputs.append(_digest(unit, options.max_bytes))
    if file.refused:
        yield reject_at(options.source, file.name, "not_regular_file", file.refused)
        return
    for position, row in read_rows(file, options.source):
        yield row if isinstance(row, Reject) else _row_outcome(position, row, field, options)


def _python_outcome(unit: Unit, options: IngestOptions, tally: Tally) -> Record | Reject:
    """The record of one source file, or why there is none."""
    file = unit[1]
    try:
        data = _load(file, options.max_bytes)
    except DocumentError as error:
        tally.inputs.append([unit[0], file.name, file.size, ""])
        return reject_at(options.source, file.name, error.reason, error.detail)
    tally.inputs.append(_bytes_digest(unit, data))
    try:
        text = check_text(decode_python(data), options.min_bytes)
    except DocumentError as error:
        return reject_at(options.source, file.name, error.reason, error.detail)
    return Record(
        id=record_id(options.source, file.name),
        text=text,
        source=options.source,
        lang="Python",
        path=file.inside,
    )


def _row_outcome(
    position: str, row: dict[str, Json], field: str | None, options: IngestOptions
) -> Record | Reject:
    """The record of one row, or why there is none."""
    try:
        assert field is not None
        if field not in row:
            raise DocumentError("missing_field", f"no field {field!r}")
        text = row[field]
        if not isinstance(text, str):
            raise DocumentError("type", f"field {field!r} is {type(text).__name__}, not a string")
        # A character has at most four bytes, so that most texts need no count of bytes here.
        if 4 * len(text) > options.max_bytes:
            size = len(text.encode("utf-8", "surrogatepass"))
            if size > options.max_bytes:
                raise DocumentError("too_large", f"{size} bytes, above {options.max_bytes}")
        record = Record(
            id=record_id(options.source, position),
            text=check_text(text.removeprefix("\ufeff"), options.min_bytes),
            source=options.source,
        )
        return _with_metadata(record, row, field)
    except DocumentError as error:
        return reject_at(options.source, position, error.reason, error.detail)


def _with_metadata(record: Record, row: dict[str, Json], field: str) -> Record:
    """Carry a row's other fields over: known ones under our names, the others in `meta`."""
    used = {field}
    values: dict[str, Json] = {}
    for key, names in _ALIASES.items():
        name = next((name for name in names if row.get(name)), None)
        if name is None:
            continue
        value = row[name]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = " AND ".join(value)
        if isinstance(value, str):
            values[key] = value
            used.add(name)
    for key in _STAGE_KEYS:
        if key in row:
            values[key] = row[key]
            used.add(key)
    meta = {key: value for key, value in row.items() if key not in used and value is not None}
    if meta:
        values["meta"] = meta
    if _nesting(values) > MAX_NESTING:
        raise DocumentError("json", f"nested more than {MAX_NESTING} deep")
    # Parquet and hub rows may hold dates and the like, which JSON has not, and numbers such as NaN.
    text = json.dumps(values, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DocumentError("surrogate", "a field beside the text holds half a character") from None
    values = json.loads(text, parse_constant=lambda name: None)
    return cast(Record, {**record, **values})


def _nesting(value: Json) -> int:
    """How many lists and objects lie inside each other; without recursion, since input decides."""
    depth, level = 0, [value]
    while level:
        depth += 1
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, dict | list)]
    return depth
