"""The first stage: raw files and rows become records, or rejects with a reason.

Every document read ends in exactly one of kept and rejected. The checks, in this order:

    not_regular_file  symbolic link, named pipe, device (never followed, never opened)
    data_file         an archive or data file in a folder of .py files, which alone are read there
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
    opted_out         its repository is on the opt-out list
    license           its licence is not on the allow-list, or not known

Archives, the Stack Exchange dump and programming contests have reasons of their own: see
`archives.py`, `stackoverflow.py` and `code_contests.py`.

`long_word` bounds tokenization: byte-pair encoding is slower than linear in the length of a word
(0.8 s for 1 MB, 13 s for 4 MB), and such words are embedded data, not code.
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_pipeline.ingest.code_contests import is_contest_row
from data_pipeline.ingest.documents import TextRules
from data_pipeline.ingest.licenses import load_filters, load_same_filters
from data_pipeline.ingest.options import IngestOptions, IngestRun
from data_pipeline.ingest.readers import READERS, Reading, first_row, identity
from data_pipeline.ingest.rows import Span, text_field
from data_pipeline.ingest.sources import (
    Source,
    SourceFile,
    check_outside,
    find_source,
    printable,
)
from data_pipeline.ingest.stackoverflow import PostOptions, TextLimits, read_posts
from data_pipeline.records.record import Json, Record, Reject, digest, reject_at, with_content_id
from data_pipeline.records.text import LONG_WORD
from data_pipeline.runner.finished import Finished, Show, run_planned
from data_pipeline.runner.output import write_json
from data_pipeline.runner.stage import Stage, Tally, Work

VERSION = "4"
SHARD_BYTES = 32 * 2**20  # small files are gathered to shards of this size
SHARD_FILES = 20_000
NOTES = (
    "a UTF-8 byte order mark is dropped",
    "carriage return + line feed becomes line feed",
)

_LABELS = {"stack": "stack", "code-contests": "code_contests", "stackoverflow": "stackoverflow"}
_STACK_FIELDS = ("max_stars_repo_name", "repo_name")  # version 1, version 2


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One file of a source, or a piece of a large one.

    Attributes:
        source: index of the source.
        file: the file.
        format: how its rows are read: `text`, or one of `FORMATS`.
        field: its text field, for rows of text.
        span: the piece, None for the whole.
        label: of the records.
    """

    source: int
    file: SourceFile
    format: str
    field: str | None = None
    span: Span | None = None
    label: str

    @property
    def size(self) -> int:
        """Bytes, as far as they say how much work it is."""
        in_bytes = self.span is not None and self.span.in_bytes
        return self.span.stop - self.span.start if self.span and in_bytes else self.file.size

    @property
    def is_first(self) -> bool:
        """Whether it is the whole of its file or the first piece."""
        return self.span is None or self.span.start == 0


@dataclass(frozen=True)
class IngestShard:
    """Consecutive files of the sources, and how they are read."""

    units: list[Unit]
    options: IngestOptions


def ingest(run: IngestRun, show: Show) -> Finished:
    """Ingest sources into a records directory.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_ingest` and `run_stage`.
    """
    started = time.monotonic()
    planned = plan_ingest(run.sources, run.options, run.output.out)
    libraries = ("pyarrow", "datasets", "zstandard", "py7zr")
    done = run_planned(planned, run.output, run.engine, show, libraries=libraries, started=started)
    return Finished(done.result, done.line.replace("wrote", "ingested", 1))


def plan_ingest(
    arguments: Sequence[str], options: IngestOptions, out: Path | None = None
) -> tuple[Stage, Work]:
    """Find the sources and divide them into shards.

    Args:
        arguments: SOURCE arguments (`sources.find_source`), in the order of the output.
        options: the stage's options.
        out: the records directory to make, which must not be among what is read.

    Raises:
        FileNotFoundError: a source, or a list of licences or repositories, does not exist.
        ValueError: a source or list cannot be used; the first row of a data file lacks the text
            field; a source is not of the format asked for; `out` is in a folder of data files.
    """
    sources = [
        find_source(argument, name, options.exclude)
        for argument, name in zip(arguments, _source_names(arguments), strict=True)
    ]
    if out is not None:
        check_outside(sources, out)
    units = [
        unit
        for index, source in enumerate(sources)
        for file in source.files
        for unit in _plan_file(index, file, options)
    ]
    filters = load_filters(options.filters.absolute())
    config = {item.name: getattr(options, item.name) for item in fields(options)}
    config |= {"long_word": LONG_WORD, "filters": filters.digests}
    shards = [units] if options.limit else _divide(units)
    first = [unit for unit in units if unit.is_first]
    stage = Stage(name="ingest", version=VERSION, config=config, function=ingest_shard, notes=NOTES)
    work = Work(
        shards=[IngestShard(shard, options) for shard in shards],
        fingerprint=[
            [u.source, u.file.name, u.file.size, u.file.mtime_ns, u.file.refused] for u in first
        ],
        describe=lambda recorded: _describe(sources, [e for shard in recorded for e in shard]),
        identify=lambda: _describe(sources, [_digest(unit, options.max_bytes) for unit in first]),
        finish=_write_counts,
    )
    return stage, work


def _write_counts(directory: Path, notes: list[list[Json]]) -> None:
    """Put the counts of the posts of Stack Exchange dumps alongside the parts."""
    counts = [note for shard in notes for note in shard]
    if counts:
        write_json(directory / "posts.json", counts)


def _source_names(arguments: Sequence[str]) -> list[str]:
    """The last part of each argument's path, numbered where two are equal."""
    names: list[str] = []
    for argument in arguments:
        base = os.path.basename(os.path.abspath(argument)) if os.path.exists(argument) else argument
        choices = itertools.chain([base], (f"{base}~{number}" for number in itertools.count(2)))
        names.append(next(name for name in choices if name not in names))
    return names


def _plan_file(index: int, file: SourceFile, options: IngestOptions) -> list[Unit]:
    """The pieces of a file, with what its first row says about it.

    Raises:
        ValueError: it is not of the format asked for, or lacks the text field.
    """
    wanted = None if options.format == "auto" else options.format
    kind, found, name = "text", None, options.text_field
    reader = READERS[file.kind]
    if file.refused:
        pass
    elif reader.holds_posts(file):
        kind = "stackoverflow"
    else:
        found = first_row(file)
    if found is not None:
        kind = _row_format(found[1], options)
        name = text_field(*found, name) if kind != "code-contests" else None
    if wanted not in (None, kind) and (found is not None or "stackoverflow" in (wanted, kind)):
        raise ValueError(f"{file.path}: `format` {wanted}, but it looks like {kind!r}")
    label = options.source or _LABELS.get(wanted or kind, "local")
    return [
        Unit(source=index, file=file, format=kind, field=name, span=span, label=label)
        for span in ([None] if file.refused else reader.spans(file))
    ]


def _row_format(row: dict[str, Json], options: IngestOptions) -> str:
    """The format of a data file by its first row: contests are told, The Stack has to be named."""
    if is_contest_row(row) and options.text_field is None:
        return "code-contests"
    is_stack = options.format == "stack" and any(field in row for field in _STACK_FIELDS)
    return "stack" if is_stack else "text"


def _divide(units: list[Unit]) -> list[list[Unit]]:
    """Gather consecutive files up to `SHARD_BYTES`; a larger file is a shard of its own."""
    shards: list[list[Unit]] = []
    size = 0
    for unit in units:
        full = size + unit.size > SHARD_BYTES or (shards and len(shards[-1]) >= SHARD_FILES)
        if not shards or full or unit.span is not None:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size
    return shards


def _entry(unit: Unit, identity: tuple[int, str]) -> list[Json]:
    """What a file contributes to the identity of its source: [source, name, bytes, SHA-256]."""
    return [unit.source, unit.file.name, *identity]


def _digest(unit: Unit, max_bytes: int) -> list[Json]:
    """The entry of a file that has not been read yet."""
    return _entry(unit, (0, "") if unit.file.refused else identity(unit.file, max_bytes))


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
    options = shard.options
    filters = load_same_filters(options.filters.absolute(), config["filters"])
    for unit in shard.units:
        for outcome in _read_unit(unit, options, tally):
            tally.records_in += 1
            if not isinstance(outcome, Reject):
                outcome = with_content_id(outcome)
            refusal = None if isinstance(outcome, Reject) else filters.refusal(outcome)
            if refusal is None or isinstance(outcome, Reject):
                yield outcome
            else:
                where = outcome.get("repo") or outcome.get("url") or unit.file.name
                yield Reject(outcome["id"], *refusal, where)
            if tally.records_in == options.limit:
                return


def _read_unit(unit: Unit, options: IngestOptions, tally: Tally) -> Iterator[Record | Reject]:
    file = unit.file
    rules = TextRules(
        source=unit.label,
        min_bytes=options.min_bytes,
        max_bytes=options.max_bytes,
        max_solutions=options.max_solutions,
    )
    if file.refused:
        tally.inputs.append(_digest(unit, options.max_bytes))
        yield reject_at(unit.label, file.name, file.reason, file.refused)
    elif unit.format == "stackoverflow":
        tally.inputs.append(_digest(unit, options.max_bytes))
        posts = PostOptions(
            tags=tuple(options.tags),
            min_score=options.min_score,
            max_answers=options.max_answers,
            site=options.site,
        )
        limits = TextLimits(min_bytes=options.min_bytes, max_bytes=options.max_bytes)
        yield from read_posts(file, unit.label, posts, limits, tally.notes)
    else:
        reading = Reading(
            rules=rules,
            field=unit.field,
            is_contest=unit.format == "code-contests",
            span=unit.span,
            describe=lambda size, sha256: tally.inputs.append(_entry(unit, (size, sha256))),
        )
        yield from READERS[file.kind].outcomes(file, reading)
