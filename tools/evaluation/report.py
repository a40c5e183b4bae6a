"""What an evaluation says: scores with intervals, how programs ended, the similarity split."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.evaluation.compare import describe_pair
from tools.evaluation.pass_at_k import score
from tools.evaluation.suites import Suite

TENSORBOARD_NAME = "tensorboard"


def summarise(
    suite: Suite,
    results: Iterable[Mapping[str, Any]],
    ks: Iterable[int],
    similarity: Mapping[str, Mapping[str, bool]],
) -> dict[str, Any]:
    """Scores of an evaluation.

    Args:
        suite: the problems.
        results: rows with `task_id`, `passed` and `status`.
        ks: which pass@k; those beyond the number of samples are left out.
        similarity: for each name of a threshold, which problems resemble the training corpus.

    Returns:
        `problems`, `programs`, `statuses`, `pass@k` (k → value, low, high, problems) and, with
        `similarity`, the same scores apart for `similar` and `other` problems; with groups in the
        suite, `groups`: for each its `problems` and `pass@k`.
    """
    outcomes: dict[str, list[bool]] = {}
    statuses: Counter[str] = Counter()
    for row in results:
        outcomes.setdefault(row["task_id"], []).append(row["passed"])
        statuses[row["status"]] += 1
    ks = sorted(set(ks))
    summary: dict[str, Any] = {
        "suite": suite.name,
        "suite_sha256": suite.sha256,
        "problems": len(outcomes),
        "programs": statuses.total(),
        "statuses": dict(statuses.most_common()),
        "pass@k": _scores(outcomes, ks),
    }
    groups = {p.task_id: p.group for p in suite.problems if p.group is not None}
    if groups:
        summary["groups"] = {}
        for group in sorted(set(groups.values())):
            part = {task: flags for task, flags in outcomes.items() if groups.get(task) == group}
            summary["groups"][group] = {"problems": len(part), "pass@k": _scores(part, ks)}
    if similarity:
        summary["similarity"] = {
            name: {
                part: _scores(
                    {t: f for t, f in outcomes.items() if flags.get(t, False) is is_so}, ks
                )
                for part, is_so in (("similar", True), ("other", False))
            }
            for name, flags in similarity.items()
        }
    return summary


def _scores(outcomes: Mapping[str, list[bool]], ks: Iterable[int]) -> dict[str, Any]:
    """The scores that there are samples for."""
    found = {str(k): score(outcomes, k) for k in ks}
    return {k: asdict(value) for k, value in found.items() if value is not None}


def render(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{summary['suite']}: {summary['problems']} problems, {summary['programs']} programs, "
        f"isolation: {summary['isolation']}"
    ]
    lines += _score_lines(summary["pass@k"], "")
    ended = ", ".join(f"{count} {status}" for status, count in summary["statuses"].items())
    lines.append(f"ended: {ended}")
    for group, found in summary.get("groups", {}).items():
        lines += _score_lines(found["pass@k"], f"group {group}, ")
    for family, found in summary.get("perturbed", {}).items():
        value = found["after"]
        lines.append(
            f"perturbed, {family} ({found['changed']} of {summary['problems']} problems): pass@1 "
            f"{100 * value['value']:.2f} % (95 %: {100 * value['low']:.1f} to "
            f"{100 * value['high']:.1f}); against the clean suite {describe_pair(found)}"
        )
    for name, parts in summary.get("similarity", {}).items():
        for part, scores in parts.items():
            label = f"{part} to the corpus at {name}, " if part == "similar" else f"{part}, "
            lines += _score_lines(scores, label) or [f"{label}none"]
    return "\n".join(lines)


def _score_lines(scores: Mapping[str, Any], label: str) -> list[str]:
    return [
        f"{label}pass@{k}: {100 * value['value']:.2f} % (95 %, Wilson over {value['problems']} "
        f"problems: {100 * value['low']:.1f} to {100 * value['high']:.1f})"
        for k, value in scores.items()
    ]


def read_similarity(path: Path | None, suite: Suite) -> dict[str, dict[str, bool]]:
    """Read which problems resemble the training corpus.

    The file is the `report.json` of `megaphi data decontaminate`, or a JSON object: problem → true
    or false, or threshold → such an object. Problems of other suites are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an object, or says nothing of a problem of the suite.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: not an object of problems")
    if "benchmarks" in content:
        try:
            content = _of_decontamination(content["benchmarks"], suite)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a report of `megaphi data decontaminate` "
                f"({type(error).__name__}: {error})"
            ) from None
        if not content:
            raise ValueError(f"{path}: the corpus was not compared with {suite.name}")
    if all(isinstance(value, bool) for value in content.values()):
        content = {path.stem: content}
    for name, flags in content.items():
        if not isinstance(flags, dict) or not all(isinstance(f, bool) for f in flags.values()):
            raise ValueError(f"{path}: {name} must map problems to true or false")
        for problem in suite.problems:
            if problem.task_id not in flags:
                raise ValueError(f"{path}: {name} says nothing of {problem.task_id}")
    similarity: dict[str, dict[str, bool]] = content
    return similarity


def _of_decontamination(benchmarks: Any, suite: Suite) -> dict[str, dict[str, bool]]:
    """The similar problems at each tau, from the benchmark that has the suite's problems."""
    names = {problem.task_id for problem in suite.problems}
    for found in benchmarks.values():
        twins = {str(twin["task_id"]) for twin in found["twins"]}
        if (twins and twins <= names) or (not twins and found["problems"] == len(names)):
            return {
                f"tau {row['tau']:g}": {
                    name: name in {str(i) for i in row["similar_problems"]} for name in names
                }
                for row in found["split"]
            }
    return {}


def draw(run_dir: Path, suite_name: str, points: Iterable[tuple[int, Mapping[str, Any]]]) -> Path:
    """Draw scores over training tokens into a run's TensorBoard; earlier drawings are replaced.

    Args:
        run_dir: the run.
        suite_name: names the curve.
        points: consumed tokens and summary of each checkpoint.

    Returns:
        The directory of the event file. TensorBoard shows the tokens as its step.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / TENSORBOARD_NAME / f"evaluation-{suite_name}"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as board:
        for tokens, summary in points:
            for k, value in summary["pass@k"].items():
                for part in ("value", "low", "high"):
                    tag = f"evaluation/{suite_name}/pass@{k}" + (
                        "" if part == "value" else f"/{part}"
                    )
                    board.add_scalar(tag, value[part], tokens)
    return folder
