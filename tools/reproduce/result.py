"""The scores of a figure's models: rows, means over seeds with intervals, paired tests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.evaluation.compare import mcnemar
from tools.evaluation.pass_at_k import wilson
from tools.reproduce.figure import BEST, Arm, Plan
from tools.reproduce.jobs import Jobs

Key = tuple[str, str, str]
"""Size, corpus and exercises of an arm."""


@dataclass(frozen=True)
class Outcomes:
    """Which problems the models of one arm solved: seed -> problem -> solved."""

    by_seed: Mapping[int, Mapping[str, bool]]

    @property
    def mean(self) -> float:
        """pass@1 over problems and seeds."""
        values = [passed for row in self.by_seed.values() for passed in row.values()]
        return sum(values) / len(values)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval with the problems of one seed as the trials.

        More seeds do not narrow it: they share the problems.
        """
        problems = len(next(iter(self.by_seed.values())))
        return wilson(self.mean, problems)


def read_outcomes(directory: Path) -> dict[str, bool]:
    """Verdict of each problem from an evaluation directory."""
    rows = (json.loads(line) for line in (directory / "results.jsonl").open(encoding="utf-8"))
    return {row["task_id"]: bool(row["passed"]) for row in rows}


def gather(plan: Plan, jobs: Jobs, training_of: Mapping[Arm, tuple[str, ...]]) -> dict[str, Any]:
    """Everything that the page shows, as JSON.

    Args:
        plan: the figure.
        jobs: its commands, all done.
        training_of: names of the commands that made each arm's model.
    """
    groups = read_groups(plan.suite)
    outcomes: dict[Key, dict[int, dict[str, bool]]] = {}
    rows = []
    total = plan.scale.pretraining_tokens + plan.scale.exercise_tokens
    for arm in plan.arms:
        found = read_outcomes(plan.score_of(arm))
        key = (arm.size.name, arm.corpus, arm.exercises)
        outcomes.setdefault(key, {})[arm.seed] = found
        seconds = sum(map(jobs.cpu_seconds, training_of[arm]))
        rows.append(
            {
                "size": arm.size.name,
                "parameters": arm.size.num_parameters,
                "corpus": arm.corpus,
                "exercises": arm.exercises,
                "seed": arm.seed,
                "tokens": total,
                "pass_at_1": round(sum(found.values()) / len(found), 4),
                "by_group": scores_by_group(found, groups),
                "cpu_seconds": round(seconds, 1),
            }
        )
    means = {key: Outcomes(by_seed) for key, by_seed in outcomes.items()}
    canonical = read_outcomes(plan.out / "scores" / "canonical")
    return {
        "rows": rows,
        "arms": [
            {
                "size": key[0],
                "corpus": key[1],
                "exercises": key[2],
                "pass_at_1": round(value.mean, 4),
                "low": round(value.interval[0], 4),
                "high": round(value.interval[1], 4),
            }
            for key, value in means.items()
        ],
        "comparisons": _comparisons(means),
        "problems": len(canonical),
        "canonical_passed": sum(canonical.values()),
        "leaks": _leaks(plan.out / "leaks"),
    }


def read_groups(suite: Path) -> dict[str, str]:
    """The group of each problem of a suite."""
    rows = (json.loads(line) for line in suite.open(encoding="utf-8"))
    return {row["task_id"]: row["group"] for row in rows}


def scores_by_group(found: Mapping[str, bool], groups: Mapping[str, str]) -> dict[str, float]:
    """pass@1 of each group."""
    parts: dict[str, list[bool]] = {}
    for task, passed in found.items():
        parts.setdefault(groups[task], []).append(passed)
    return {group: round(sum(flags) / len(flags), 4) for group, flags in sorted(parts.items())}


def _leaks(directory: Path) -> int:
    """Training documents that decontamination against the suite rejected."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return sum(manifest["rejected"].values())


def _comparisons(means: Mapping[Key, Outcomes]) -> list[dict[str, Any]]:
    """The claims of the figure, each with its difference and a paired test."""
    pairs: list[tuple[str, Key, Key]] = []
    for size, corpus, exercises in means:
        here = (size, corpus, exercises)
        if corpus != "none" and exercises == "clean":
            pairs.append(("exercises after pretraining", here, (size, corpus, "none")))
        if corpus == BEST and exercises == "clean":
            pairs.append(("pretraining before exercises", here, (size, "none", "clean")))
            for other in ("raw", "filtered"):
                pairs.append((f"{BEST} over {other}", here, (size, other, "clean")))
            for other in ("half-wrong", "narrow"):
                pairs.append((f"clean over {other}", here, (size, corpus, other)))
    return [
        {"claim": claim, "arm": list(one), "against": list(two), **_paired(means[one], means[two])}
        for claim, one, two in pairs
        if two in means
    ]


def _paired(one: Outcomes, two: Outcomes) -> dict[str, Any]:
    """Difference of two arms on the same problems, and McNemar's exact test."""
    gained = lost = 0
    for seed, row in one.by_seed.items():
        for task, passed in row.items():
            other = two.by_seed[seed][task]
            gained += passed and not other
            lost += other and not passed
    return {
        "points": round(100 * (one.mean - two.mean), 2),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
        "disjoint": one.interval[0] > two.interval[1] or two.interval[0] > one.interval[1],
    }
