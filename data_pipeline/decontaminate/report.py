"""What decontamination found: which problems have a near twin in the corpus, as JSON and text."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.decontaminate.benchmarks import Problem
from data_pipeline.records.record import Json
from data_pipeline.runner.output import write_json

REPORT_NAME = "report.json"
TEXT_NAME = "report.txt"


def write_reports(
    directory: Path, notes: list[list[Json]], problems: Sequence[Problem], config: dict[str, Json]
) -> None:
    """Write `report.json` and `report.txt`.

    Args:
        directory: of the output.
        notes: of each shard, as `decontaminate` made them.
        problems: the benchmarks.
        config: the stage's configuration.
    """
    report = _build_report([note for shard in notes for note in shard], problems, config)
    write_json(directory / REPORT_NAME, report)
    (directory / TEXT_NAME).write_text(report_text(report) + "\n", encoding="utf-8")


def _build_report(
    notes: list[dict[str, Any]], problems: Sequence[Problem], config: dict[str, Json]
) -> dict[str, Json]:
    """The report over all shards: counts, and for each benchmark the split at each tau."""
    best: dict[int, list[Any]] = {}
    shared: Counter[int] = Counter()
    near: Counter[int] = Counter()
    closest: dict[int, list[Any]] = {}
    over: Counter[tuple[str, float]] = Counter()
    for note in notes:
        for number, rate, record in note["best"]:
            if rate > best.get(number, [0.0])[0]:
                best[number] = [rate, record]
        shared.update(dict(note["ngram_documents"]))
        near.update(dict(note["embedding_documents"]))
        for number, distance, record in note["closest"]:
            if number not in closest or distance < closest[number][0]:
                closest[number] = [distance, record]
        for name, tau, count in note["ast_documents"]:
            over[name, tau] += count
    taus = sorted(config["taus"], reverse=True)
    report: dict[str, Json] = {
        name: sum(note[name] for note in notes)
        for name in ("documents", "not_parsed", "functions", "pairs")
    }
    report["ngram"], report["drop_at"] = config["ngram"], config["drop_at"]
    report["embedding_distance"] = config.get("embedding_distance")
    benchmarks: dict[str, Json] = {}
    for name in dict.fromkeys(problem.benchmark for problem in problems):
        mine = [i for i, problem in enumerate(problems) if problem.benchmark == name]
        too_small = [i for i in mine if len(problems[i].nodes) < config["min_nodes"]]
        benchmarks[name] = {
            "problems": len(mine),
            "not_compared": [problems[i].task_id for i in too_small] if config["ast"] else None,
            "ngram": [problems[i].task_id for i in mine if shared[i]],
            "embedding": [
                {
                    "task_id": problems[i].task_id,
                    "documents": near[i],
                    "distance": closest[i][0],
                    "record": closest[i][1],
                }
                for i in mine
                if i in closest
            ],
            "split": [
                _split(tau, mine, best, problems) | {"documents_with_twin": over[name, tau]}
                for tau in taus
                if config["ast"]
            ],
            "twins": [
                {"task_id": problems[i].task_id, "rate": best[i][0], "record": best[i][1]}
                for i in mine
                if i in best
            ],
        }
    report["benchmarks"] = benchmarks
    return report


def _split(
    tau: float, mine: list[int], best: dict[int, list[Any]], problems: Sequence[Problem]
) -> dict[str, Json]:
    similar = [i for i in mine if i in best and best[i][0] >= tau]
    return {
        "tau": tau,
        "similar": len(similar),
        "non_similar": len(mine) - len(similar),
        "total": len(mine),
        "similar_problems": [problems[i].task_id for i in similar],
    }


def report_text(report: dict[str, Json]) -> str:
    """The report as a table for people, in the form of phi-1's Table 3."""
    lines = [
        f"{report['documents']} documents, {report['functions']} functions, "
        f"{report['pairs']} pairs compared; {report['not_parsed']} documents do not parse"
    ]
    for name, found in report["benchmarks"].items():
        lines += ["", f"{name}: {found['problems']} problems"]
        if report["ngram"]:
            lines.append(f"  share {report['ngram']} words with a document: {len(found['ngram'])}")
        if report["embedding_distance"] is not None:
            lines.append(
                f"  within {report['embedding_distance']:g} of a document's embedding: "
                f"{len(found['embedding'])}"
            )
        if found["not_compared"]:
            lines.append(f"  too small for the AST match: {len(found['not_compared'])}")
        if found["split"]:
            lines.append("  tau    similar  non-similar  total  documents with a twin")
        for row in found["split"]:
            lines.append(
                f"  {row['tau']:<5g}  {row['similar']:>7}  {row['non_similar']:>11}  "
                f"{row['total']:>5}  {row['documents_with_twin']:>21}"
            )
    return "\n".join(lines)


def read_report(directory: Path) -> dict[str, Json]:
    """The report of a finished output."""
    report: dict[str, Json] = json.loads((directory / REPORT_NAME).read_bytes())
    return report
