"""Records: what flows between corpus stages, and the JSONL files they are kept in.

A records directory holds `part-00000.jsonl`, … (one record a line; `.jsonl.zst` when compressed),
`rejected-00000.jsonl`, … (what was refused, and why) and `manifest.json` (see `output.py`).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from data_pipeline.records.jsonl import MAX_LINE_BYTES, open_jsonl, read_lines
from megaphi.errors import RunError

Json = Any  # a value that `json.loads` can return

REQUIRED_KEYS = ("id", "text", "source")


class Lineage(TypedDict):
    """One stage that a record has passed: its name, version and configuration digest."""

    stage: str
    version: str
    config: str


class Record(TypedDict):
    """One document of a corpus.

    Attributes:
        id: 32 hexadecimal digits, the start of a SHA-256 over the place in the source and the text
            (`with_content_id`): the same on every machine and in every run, and never that of
            another text. A stage that changes a text changes its id.
        text: the document, valid Unicode without NUL or surrogates, lines ending in line feed.
        source: a label such as `stack`, `stackoverflow`, `textbook`, `exercise`, `local`.
        lang: programming or natural language.
        license: SPDX identifiers; several are joined by " AND ", since all were found to apply.
        url: where the document was published.
        repo: the repository it came from, `owner/name`.
        path: its path in the repository or source directory.
        revision: commit or version.
        meta: whatever else the source gave, unchanged.
        lineage: the stages passed, oldest first.

    Stages add further keys (`quality`, `gen`, `dup`, `decon`, …); every stage keeps the keys that
    it does not know.
    """

    id: str
    text: str
    source: str
    lang: NotRequired[str]
    license: NotRequired[str]
    url: NotRequired[str]
    repo: NotRequired[str]
    path: NotRequired[str]
    revision: NotRequired[str]
    meta: NotRequired[dict[str, Json]]
    lineage: NotRequired[list[Lineage]]


@dataclass(frozen=True)
class Reject:
    """A document that a stage refused.

    Attributes:
        id: the record's id; one made from the source position where there is no record yet.
        reason: a short fixed word, counted in the manifest (`utf8`, `too_large`, …).
        detail: what was seen, for a person.
        position: where it came from, such as `corpus/a.jsonl:byte 1024`.
    """

    id: str
    reason: str
    detail: str
    position: str

    def line(self) -> bytes:
        """The JSONL line of the rejects file; pure ASCII, so that any text can be quoted."""
        return json.dumps(vars(self)).encode("ascii") + b"\n"


def record_id(source: str, key: str) -> str:
    """The stable id of a document: 32 hexadecimal digits of SHA-256 over (source label, key)."""
    return hashlib.sha256(f"{source}\0{key}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def with_content_id(record: Record) -> Record:
    """The record with an id made of the one that it has, its text, and what says where it is from.

    File names alone would give equal ids to different documents.
    """
    origin = [record.get(key) for key in ("repo", "path", "revision", "url")]
    record["id"] = record_id(record["id"], json.dumps([record["text"], *origin]))
    return record


def reject_at(source: str, position: str, reason: str, detail: str) -> Reject:
    """A reject of something that never became a record; its id is made from the position."""
    return Reject(record_id(source, position), reason, detail, position)


def digest(value: Json) -> str:
    """SHA-256 of the canonical JSON of a value: the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def record_line(record: Record) -> bytes:
    """The JSONL line of a record, UTF-8.

    Raises:
        UnicodeEncodeError: a string of the record holds a surrogate.
    """
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def parse_record(line: bytes, where: str) -> Record:
    """Read one line of a records file.

    Raises:
        RunError: the line is not a record; `where` (file and line number) is named. The files are
            written by our own stages, so this is damage, not bad input.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{where}: not a JSON line ({error}); rebuild the records") from None
    if not isinstance(record, dict):
        raise RunError(f"{where}: not a record but {type(record).__name__}; rebuild the records")
    for key in REQUIRED_KEYS:
        if not isinstance(record.get(key), str):
            raise RunError(f"{where}: the record has no string {key!r}; rebuild the records")
    return cast(Record, record)


def read_part(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (position, record) of one part file; position is `file:line` for messages.

    Raises:
        RunError: a line is not a record.
    """
    with open_jsonl(path) as stream:
        for number, (_, line) in enumerate(read_lines(stream), start=1):
            where = f"{path}:{number}"
            if line is None:
                raise RunError(f"{where}: line longer than {MAX_LINE_BYTES} bytes")
            yield where, parse_record(line, where)
