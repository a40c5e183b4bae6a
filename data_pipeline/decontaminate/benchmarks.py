"""Benchmarks that a corpus must not hold: problems of HumanEval, MBPP, or any JSONL file."""

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.decontaminate.options import Fields
from data_pipeline.records.jsonl import open_jsonl, read_lines
from data_pipeline.records.record import Json
from data_pipeline.similarity.ast_match import functions_of, node_string, parse
from megaphi.durable import file_sha256

_MAX_NODES = 10_000


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        benchmark: name of its file, without suffix.
        task_id: its id there.
        prose: texts that state it.
        code: texts of its solution and tests.
        nodes: node string (`ast_match`) of the function that solves it, empty if there is none.
    """

    benchmark: str
    task_id: str
    prose: tuple[str, ...]
    code: tuple[str, ...]
    nodes: str


def benchmark_sha256(path: Path) -> str:
    """SHA-256 of a benchmark file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such benchmark file")
    return file_sha256(path)


def load_benchmarks(paths: Sequence[Path], fields: Fields) -> list[Problem]:
    """Read benchmark files: `.jsonl`, `.jsonl.gz` or `.jsonl.zst`, one problem a line.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is not a problem, or two files have one name.
    """
    problems: list[Problem] = []
    for path in paths:
        name = path.name.split(".jsonl")[0]
        if any(problem.benchmark == name for problem in problems):
            raise ValueError(f"{path}: there is another benchmark named {name}; rename the file")
        benchmark_sha256(path)
        with gzip.open(path) if path.suffix == ".gz" else open_jsonl(path) as stream:
            for number, (_, line) in enumerate(read_lines(stream), start=1):  # type: ignore[arg-type]
                problems.append(_problem(name, line, f"{path}:{number}", fields))
    if not problems:
        raise ValueError(f"{', '.join(map(str, paths))}: no problem in the benchmark files")
    return problems


def _problem(name: str, line: bytes | None, where: str, fields: Fields) -> Problem:
    try:
        row = json.loads(line or b"")
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON line ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object")
    fields = _complete(row, fields)
    for key in (fields.id_field, *fields.text_field, *filter(None, [fields.code_field])):
        if key not in row:
            raise ValueError(
                f"{where}: no field {key!r}; there are {', '.join(map(repr, row))}; name them with "
                "`id_field`, `text_field`, `code_field`"
            )
    prose = tuple(_text(row[key], f"{where}: {key}") for key in fields.text_field)
    name_of_code = fields.code_field
    code = _text(row[name_of_code], f"{where}: {name_of_code}") if name_of_code else ""
    if name_of_code == "canonical_solution":
        code = prose[0] + code  # HumanEval's prompt is the head of the function
    tests = row.get("test_list") or row.get("test") or ""
    tests = "\n".join(tests) if isinstance(tests, list) else str(tests)
    entry = str(row.get("entry_point") or "")
    nodes = _solution_nodes(code, entry, tests)
    return Problem(
        name, str(row[fields.id_field]), prose, tuple(filter(None, (code, tests))), nodes
    )


def _complete(row: dict[str, Json], fields: Fields) -> Fields:
    """Fill in the fields that were not named."""
    text = fields.text_field or tuple(key for key in ("prompt", "text") if key in row)[:1]
    code = fields.code_field or next(
        (k for k in ("canonical_solution", "code", "solution") if k in row), ""
    )
    return Fields(
        id_field=fields.id_field or "task_id",
        text_field=text or (() if code else ("text",)),
        code_field=code,
    )


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: is {type(value).__name__}, not a string")
    return value.replace("\r\n", "\n")


def _solution_nodes(code: str, entry: str, tests: str) -> str:
    """Node string of the function that is asked for.

    It is the one named by `entry_point`, else the largest of those that the tests call, else the
    largest of all.
    """
    tree = parse(code)
    functions = [] if tree is None else list(functions_of(tree))
    if not functions:
        return ""
    called = set(re.findall(r"\w+(?=\()", tests))
    strings = [
        (function.name == entry, function.name in called, node_string(function, _MAX_NODES))
        for function in functions
    ]
    return max(strings, key=lambda item: (item[0], item[1], len(item[2])))[2]


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of the problems as they are compared."""
    text = json.dumps([list(vars(problem).values()) for problem in problems])
    return hashlib.sha256(text.encode("ascii")).hexdigest()
