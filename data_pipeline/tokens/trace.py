"""Which documents came from where: for requests to remove a repository, and for audits.

The answer comes from the provenance that every stage hands on: in a records directory from the
records themselves, for a token file from `PREFIX.documents.jsonl` alongside it, whose lines say in
which order the documents lie in `PREFIX.bin`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.ingest.licenses import (
    identifiers,
    matches_repository,
    repositories,
    repository_pattern,
)
from data_pipeline.records.jsonl import read_lines
from data_pipeline.records.record import Json, Record, read_part
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import MANIFEST_NAME, check_part, read_manifest
from data_pipeline.tokens.options import TraceRun
from data_pipeline.tokens.tokenize_records import PROVENANCE_KEYS, documents_path
from megaphi.data.indexed import IndexedDataset
from megaphi.errors import RunError


@dataclass(frozen=True)
class Query:
    """What is looked for; a document has to match each kind that is not empty.

    Attributes:
        repositories: `owner/name`, or `owner/` for all of an owner's.
        ids: record ids.
        licenses: SPDX identifiers; one that occurs in the document's expression matches.
    """

    repositories: frozenset[str] = frozenset()
    ids: frozenset[str] = frozenset()
    licenses: frozenset[str] = frozenset()

    @staticmethod
    def of(repositories: Sequence[str], ids: Sequence[str], licenses: Sequence[str]) -> "Query":
        """A query from what a user types.

        Raises:
            ValueError: nothing is asked for, or a repository is not one.
        """
        if not (repositories or ids or licenses):
            raise ValueError("nothing to look for: give `repo`, `id` or `license`")
        return Query(
            frozenset(map(repository_pattern, repositories)),
            frozenset(item.lower() for item in ids),
            frozenset(item.lower() for item in licenses),
        )

    def matches(self, record: Record) -> bool:
        """Whether a record, or what is left of one in a provenance line, is looked for."""
        if self.repositories and not any(
            matches_repository(name, self.repositories) for name in repositories(record)
        ):
            return False
        if self.ids and record.get("id", "") not in self.ids:
            return False
        return not self.licenses or not self.licenses.isdisjoint(
            identifiers(record.get("license", ""))
        )

    def cannot_tell(self, record: Record) -> bool:
        """Whether a record names no repository, or no licence, where that is asked for."""
        return bool(
            (self.repositories and not any(repositories(record)))
            or (self.licenses and not record.get("license"))
        )


@dataclass
class Searched:
    """What was looked at: counted while `trace` is iterated over.

    Attributes:
        documents: all.
        silent: those that do not name what is asked for, and so cannot be found by it.
    """

    documents: int = 0
    silent: int = 0

    def count(self, record: Record, query: Query) -> None:
        """Count a document."""
        self.documents += 1
        self.silent += query.cannot_tell(record)


def trace(where: Path, query: Query, searched: Searched) -> Iterator[dict[str, Json]]:
    """Yield the documents that match, in order.

    Each has the provenance keys that are known, and its place: `file` and `line` of a records
    directory; `index`, `first_token` and `end_token` (exclusive) of a token file.

    Args:
        where: records directory, or prefix of a token file.
        query: what is looked for.
        searched: is counted up.

    Raises:
        FileNotFoundError: neither is there.
        RunError: the files are damaged or do not belong together.
    """
    if (where / MANIFEST_NAME).is_file():
        yield from _trace_records(where, query, searched)
    elif documents_path(where).is_file():
        yield from _trace_tokens(where, query, searched)
    else:
        raise FileNotFoundError(
            f"{where}: neither a records directory nor a token file with "
            f"{documents_path(where).name}"
        )


def _trace_records(directory: Path, query: Query, searched: Searched) -> Iterator[dict[str, Json]]:
    for part in read_manifest(directory).parts:
        path = check_part(directory, part)
        for number, (_, record) in enumerate(read_part(path), start=1):
            searched.count(record, query)
            if query.matches(record):
                yield {"file": part.name, "line": number, **_provenance(record)}


def _trace_tokens(prefix: Path, query: Query, searched: Searched) -> Iterator[dict[str, Json]]:
    table = documents_path(prefix)
    tokens = IndexedDataset(prefix)
    documents = tokens.document_index
    starts = np.append(tokens.pointers // tokens.dtype.itemsize, tokens.num_tokens)
    count = 0
    with table.open("rb") as stream:
        for count, (_, line) in enumerate(read_lines(stream), start=1):
            record = _parse_line(line, f"{table}:{count}", count - 1)
            searched.count(record, query)
            if count >= len(documents):
                break
            if query.matches(record):
                first, after = int(documents[count - 1]), int(documents[count])
                yield {
                    "index": count - 1,
                    "first_token": int(starts[first]),
                    "end_token": int(starts[after]),
                    **_provenance(record),
                }
    if count != len(documents) - 1:
        raise RunError(
            f"{table}: {count} lines, but {prefix} has {len(documents) - 1} documents; "
            "tokenize it again"
        )


def _parse_line(line: bytes | None, where: str, index: int) -> Record:
    """The provenance of a document.

    Raises:
        RunError: it is not the line of that document.
    """
    try:
        entry: Any = json.loads(line or b"")
        in_order = entry["index"] == index
    except (ValueError, TypeError, KeyError):
        in_order = False
    if not in_order:
        raise RunError(f"{where}: not the line of document {index}; tokenize it again")
    found: Record = entry
    return found


def _provenance(record: Record) -> dict[str, Json]:
    return {key: record[key] for key in PROVENANCE_KEYS if key in record}  # type: ignore[literal-required]


def trace_run(run: TraceRun, show: Show) -> Finished:
    """List what the user asks for, a line a document.

    Raises:
        FileNotFoundError, ValueError, RunError: see `trace` and `Query.of`.
    """
    searched = Searched()
    documents = list(trace(run.where, Query.of(run.repo, run.id, run.license), searched))
    tokens = sum(
        entry["end_token"] - entry["first_token"] for entry in documents if "index" in entry
    )
    result = {
        "where": str(run.where),
        "searched": searched.documents,
        "silent": searched.silent,
        "found": len(documents),
        "tokens": tokens,
        "documents": documents,
    }
    summary = f"{run.where}: {len(documents)} of {searched.documents} documents"
    if searched.silent:
        kinds = (("repository", run.repo), ("licence", run.license))
        asked = " or ".join(name for name, given in kinds if given)
        summary += f"; {searched.silent} of them name no {asked}"
    return Finished(result, "\n".join([*map(_line, documents), summary]))


def _line(entry: dict[str, Any]) -> str:
    """One document on one line: its place, then what is known of it."""
    if "index" in entry:
        place = f"document {entry['index']} tokens {entry['first_token']}-{entry['end_token']}"
    else:
        place = f"{entry['file']}:{entry['line']}"
    known = [f"{key}={entry[key]}" for key in entry if key not in _PLACE]
    return " ".join([place, *(text.replace("\n", "\\n") for text in known)])


_PLACE = ("index", "first_token", "end_token", "file", "line")
