"""What finetuning on exercises changed: two scores, and two answers with their verdicts."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megaphi.metrics.logger import METRICS_NAME, metric_rows
from tools.reproduce.result import read_groups, read_outcomes, scores_by_group

SHOWN_LINES = 10


def summarise(
    before: Path, after: Path, suite: Path, run_dir: Path, seconds: float
) -> dict[str, Any]:
    """Scores of two evaluations of one suite.

    Args:
        before: evaluation directory of the pretrained model.
        after: that of the finetuned one.
        suite: the problems, in HumanEval's form with a `group` each.
        run_dir: the pretraining, whose last validation loss is reported.
        seconds: how long everything took.

    Raises:
        FileNotFoundError: an evaluation or the suite is missing.
    """
    groups = read_groups(suite)
    found_before, found_after = read_outcomes(before), read_outcomes(after)
    return {
        "before": {"pass_at_1": _share(found_before), "problems": len(found_before)},
        "after": {
            "pass_at_1": _share(found_after),
            "problems": len(found_after),
            "groups": scores_by_group(found_after, groups),
        },
        "validation_loss": _validation_loss(run_dir),
        "seconds": seconds,
    }


def _share(found: Mapping[str, bool]) -> float:
    return round(sum(found.values()) / len(found), 4)


def _validation_loss(run_dir: Path) -> float | None:
    """The last one of a run; None if it was never evaluated."""
    rows = [row for _, row in metric_rows(run_dir / METRICS_NAME) if "validation_loss" in row]
    return rows[-1]["validation_loss"] if rows else None


def render(summary: Mapping[str, Any]) -> str:
    """The scores for people."""
    before, after = summary["before"], summary["after"]
    groups = ", ".join(f"{name} {share:.0%}" for name, share in after["groups"].items())
    return (
        f"pass@1 on {after['problems']} problems that no training text holds: "
        f"{before['pass_at_1']:.1%} after code and textbooks, "
        f"{after['pass_at_1']:.1%} after exercises ({groups})"
    )


def examples(suite: Path, after: Path) -> Iterator[str]:
    """One problem that the finetuned model solves and one that it does not, with its answers."""
    problems = _rows(suite, "task_id")
    completions = _rows(after / "completions.jsonl", "task_id")
    found = read_outcomes(after)
    for verdict, word in ((True, "passed"), (False, "failed")):
        task = next((task for task, passed in found.items() if passed is verdict), None)
        if task is not None:
            answer = completions[task]["completion"].rstrip().splitlines()
            text = "\n".join([problems[task]["prompt"].strip(), *answer[:SHOWN_LINES]])
            yield f"{task}, {word}:\n\n{textwrap.indent(text, '    ')}\n"


def _rows(path: Path, key: str) -> dict[str, dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return {row[key]: row for row in map(json.loads, lines)}
