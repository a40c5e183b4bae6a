"""`megaphi data trace`: list the documents of a repository, a licence or an id."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "find the documents of a repository, licence or id in records or a token file"
    parser = subparsers.add_parser(
        "trace",
        help=text,
        description=f"{text}. Options of one kind are alternatives, kinds narrow each other.",
        allow_abbrev=False,
    )
    parser.add_argument("where", type=Path, metavar="PREFIX|RECORDS_DIR")
    for name, metavar, what in (
        ("repo", "OWNER/NAME", "repository; OWNER/ for all of an owner's"),
        ("id", "ID", "record id"),
        ("license", "SPDX", "licence identifier"),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, help=f"{what}; repeatable"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the lines to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `trace` and `Query.of`.
    """
    from data_pipeline.tokens.trace import Query, Searched, trace

    query = Query.of(arguments.repo, arguments.id, arguments.license)
    searched = Searched()
    documents = list(trace(arguments.where, query, searched))
    tokens = sum(
        entry["end_token"] - entry["first_token"] for entry in documents if "index" in entry
    )
    result = {
        "verb": "trace",
        "where": str(arguments.where),
        "searched": searched.documents,
        "silent": searched.silent,
        "found": len(documents),
        "tokens": tokens,
        "documents": documents,
    }
    summary = f"{arguments.where}: {len(documents)} of {searched.documents} documents"
    if searched.silent:
        asked = " or ".join(
            name
            for name, given in (("repository", arguments.repo), ("licence", arguments.license))
            if given
        )
        summary += f"; {searched.silent} of them name no {asked}"
    return result, "\n".join([*map(_line, documents), summary])


def _line(entry: dict[str, Any]) -> str:
    """One document on one line: its place, then what is known of it."""
    if "index" in entry:
        place = f"document {entry['index']} tokens {entry['first_token']}-{entry['end_token']}"
    else:
        place = f"{entry['file']}:{entry['line']}"
    known = [f"{key}={entry[key]}" for key in entry if key not in _PLACE]
    return " ".join([place, *(text.replace("\n", "\\n") for text in known)])


_PLACE = ("index", "first_token", "end_token", "file", "line")
