"""Bytes and rows become records, or rejects with a reason: one outcome for each document."""

import json
from dataclasses import dataclass
from typing import cast

from data_pipeline.ingest.code_contests import contest_record
from data_pipeline.ingest.licenses import all_of
from data_pipeline.records.record import Json, Record, Reject, record_id, reject_at
from data_pipeline.records.text import DocumentError, check_text, decode_python

MAX_NESTING = 100  # of the other fields of a row

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


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """How documents are made of what was read.

    Attributes:
        source: label of the records.
        min_bytes: smallest text, UTF-8 bytes.
        max_bytes: largest text.
        max_solutions: solutions in the document of a contest problem.
    """

    source: str
    min_bytes: int
    max_bytes: int
    max_solutions: int


def python_outcome(data: bytes, name: str, path: str, rules: TextRules) -> Record | Reject:
    """The record of one Python file, or why there is none.

    Args:
        data: its bytes.
        name: what identifies it in the run.
        path: for the record.
        rules: see `TextRules`.
    """
    try:
        text = check_text(decode_python(data), rules.min_bytes)
    except DocumentError as error:
        return reject_at(rules.source, name, error.reason, error.detail)
    return Record(
        id=record_id(rules.source, name), text=text, source=rules.source, lang="Python", path=path
    )


def row_outcome(
    position: str, row: dict[str, Json], field: str | None, rules: TextRules
) -> Record | Reject:
    """The record of one row, or why there is none.

    Args:
        position: of the row.
        row: the row.
        field: its text field; None for a row of a programming contest.
        rules: see `TextRules`.
    """
    try:
        if field is None:
            record = contest_record(
                position,
                row,
                rules.source,
                max_solutions=rules.max_solutions,
                min_bytes=rules.min_bytes,
                max_bytes=rules.max_bytes,
            )
            return _plain_json(record, dict(record))
        if field not in row:
            raise DocumentError("missing_field", f"no field {field!r}")
        text = row[field]
        if not isinstance(text, str):
            raise DocumentError("type", f"field {field!r} is {type(text).__name__}, not a string")
        # A character has at most four bytes, so that most texts need no count of bytes here.
        if 4 * len(text) > rules.max_bytes:
            size = len(text.encode("utf-8", "surrogatepass"))
            if size > rules.max_bytes:
                raise DocumentError("too_large", f"{size} bytes, above {rules.max_bytes}")
        record = Record(
            id=record_id(rules.source, position),
            text=check_text(text.removeprefix("\ufeff"), rules.min_bytes),
            source=rules.source,
        )
        return _with_metadata(record, row, field)
    except DocumentError as error:
        return reject_at(rules.source, position, error.reason, error.detail)


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
            value = all_of(value)
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
    return _plain_json(record, values)


def _plain_json(record: Record, values: dict[str, Json]) -> Record:
    """The record with values that may come from Parquet made JSON.

    Raises:
        DocumentError: `json` or `surrogate`.
    """
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
