"""Two evaluations of the same problems, task by task: which are gained, which are lost, by chance?

The exact McNemar test: if two models were equally good, a task that only one of them solves would
be either's with probability one half. With several samples a task counts for the side on which a
larger share of them passes, and ties are left out, which is the sign test.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.evaluation.pass_at_k import score

Outcomes = Mapping[str, list[bool]]


def outcomes_of(results: Iterable[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """For each task, which of its samples passed, in the order of the samples."""
    found: dict[str, list[bool]] = {}
    for row in sorted(results, key=lambda row: row["sample"]):
        found.setdefault(row["task_id"], []).append(row["passed"])
    return found


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided probability of so uneven a split, or a more uneven one, by chance.

    Args:
        gained: tasks that only the second side solves.
        lost: tasks that only the first side solves.
    """
    count = gained + lost
    tail = sum(math.comb(count, n) for n in range(min(gained, lost) + 1))
    return min(1.0, tail / 2 ** (count - 1)) if count else 1.0


def pair(before: Outcomes, after: Outcomes) -> dict[str, Any]:
    """Compare the outcomes of the same tasks.

    Returns:
        `before` and `after` (pass@1 with interval), `difference`, `gained` and `lost` (tasks), and
        `p` of the exact McNemar test.
    """
    gained: list[str] = []
    lost: list[str] = []
    for task, flags in before.items():
        # as whole numbers: shares of different numbers of samples compare exactly
        first, second = sum(flags) * len(after[task]), sum(after[task]) * len(flags)
        if second != first:
            (gained if second > first else lost).append(task)
    scores = [score(outcomes, 1) for outcomes in (before, after)]
    first_score, second_score = (None if found is None else asdict(found) for found in scores)
    difference = None
    if first_score is not None and second_score is not None:
        difference = second_score["value"] - first_score["value"]
    return {
        "before": first_score,
        "after": second_score,
        "difference": difference,
        "gained": gained,
        "lost": lost,
        "p": mcnemar(len(gained), len(lost)),
    }


def describe_pair(found: Mapping[str, Any]) -> str:
    """The difference for people."""
    return (
        f"{100 * found['difference']:+.2f} points, {len(found['gained'])} gained, "
        f"{len(found['lost'])} lost, McNemar p = {found['p']:.2g}"
    )


def compare_directories(first: Path, second: Path) -> dict[str, Any]:
    """Compare two finished evaluations of one suite.

    Returns:
        What `pair` returns, with `suite`, `problems`, `directories`, and `differing`: settings in
        which they differ, by name.

    Raises:
        FileNotFoundError: one is no finished evaluation.
        ValueError: they are of different suites or problems.
    """
    summaries, outcomes = [], []
    for directory in (first, second):
        summary, rows = _read(directory)
        summaries.append(summary)
        outcomes.append(outcomes_of(rows))
    one, two = summaries
    if (
        one.get("suite_sha256") != two.get("suite_sha256")
        or outcomes[0].keys() != outcomes[1].keys()
    ):
        raise ValueError(
            f"{first} and {second} are of different problems ({one.get('suite')}, "
            f"{two.get('suite')}); only evaluations of the same suite can be paired"
        )
    settings = (
        "limits",
        "sandbox",
        "packages",
        "samples",
        "temperature",
        "top_p",
        "max_new_tokens",
    )
    return {
        "suite": one["suite"],
        "problems": one["problems"],
        "directories": [str(first), str(second)],
        "differing": {
            name: [one.get(name), two.get(name)]
            for name in settings
            if one.get(name) != two.get(name)
        },
        **pair(*outcomes),
    }


def _read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and results of a finished evaluation."""
    paths = [directory / name for name in ("summary.json", "results.jsonl")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; is {directory} a finished evaluation?")
    try:
        summary = json.loads(paths[0].read_bytes())
        rows = [json.loads(line) for line in paths[1].read_bytes().split(b"\n") if line.strip()]
        if summary["programs"] != len(rows):
            raise FileNotFoundError(
                f"{directory}: the evaluation is not finished ({len(rows)} results, the summary "
                f"is of {summary['programs']}); give its command again"
            )
        for row in rows:
            row["task_id"], row["sample"], row["passed"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: not the files of an evaluation ({error!r})") from None
    return summary, rows


def render_comparison(found: Mapping[str, Any]) -> str:
    """A comparison for people."""
    lines = [f"{found['suite']}: {found['problems']} problems, paired by task"]
    for name, side in zip(found["directories"], ("before", "after"), strict=True):
        value = found[side]
        lines.append(
            f"{name}: pass@1 {100 * value['value']:.2f} % "
            f"({100 * value['low']:.1f} to {100 * value['high']:.1f})"
        )
    lines.append(describe_pair(found))
    lines += [f"{what}: {' '.join(found[what])}" for what in ("gained", "lost") if found[what]]
    for name, (one, two) in found["differing"].items():
        lines.append(f"they differ in {name}: {one}, {two}")
    return "\n".join(lines)
