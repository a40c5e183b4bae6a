"""The figure for people: a PNG, a Markdown page, an HTML page, and the JSON that both rest on."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaphi.durable import write_durably
from tools.reproduce.figure import BEST

PAPER = (
    ("350M, The Stack + Stack Overflow", 12.19),
    ("350M, filtered subset", 17.68),
    ("350M, filtered + synthetic textbooks", 20.12),
    ("350M, then CodeExercises (phi-1-small)", 45.0),
    ("1.3B, filtered + textbooks (phi-1-base)", 29.0),
    ("1.3B, then CodeExercises (phi-1)", 50.6),
)
"""HumanEval pass@1 in percent, arXiv 2306.11644, sections 2.1 to 2.3 and figure 2.1."""

_COLORS = {"raw": "#8a8f98", "filtered": "#3b7dd8", BEST: "#1f9d63", "none": "#c0622f"}

DIFFERENCES = (
    "The problems are compositions of typed operations, not HumanEval; raw code is Python's "
    "standard library, not The Stack; textbooks and exercises are composed by rules, not written "
    "by GPT-3.5; models have 0.3 to 3 million parameters, not 350 million and 1.3 billion. What "
    "is the same: the trainer, the filter's method, the order (pretraining, then exercises), and "
    "scoring by running programs on problems that no training text holds."
)


def write_page(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Write `figure.json`, `figure.png`, `figure.md` and `figure.html`; returns their paths."""
    paths = [out / f"figure.{ending}" for ending in ("json", "png", "md", "html")]
    write_durably(paths[0], json.dumps(result, indent=1) + "\n")
    _draw(result, paths[1])
    markdown = _markdown(result)
    write_durably(paths[2], markdown)
    write_durably(paths[3], _html(result, paths[1].read_bytes()))
    return paths


def _arm(result: Mapping[str, Any], *key: str) -> Mapping[str, Any] | None:
    for row in result["arms"]:
        if (row["size"], row["corpus"], row["exercises"]) == key:
            found: Mapping[str, Any] = row
            return found
    return None


def _sizes(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["size"] for row in result["arms"]))


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Bars by size: each corpus alone (pale) and followed by exercises (full)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = _sizes(result)
    figure, axes = pyplot.subplots(figsize=(4 + 2.4 * len(sizes), 4.6), layout="constrained")
    corpora = dict.fromkeys(row["corpus"] for row in result["arms"])
    bars = [*(name for name in corpora if name != "none"), "none"]
    width = 0.8 / len(bars)
    for place, size in enumerate(sizes):
        for number, corpus in enumerate(bars):
            at = place + (number - (len(bars) - 1) / 2) * width
            for exercises, alpha in (("clean", 1.0), ("none", 0.45)):
                row = _arm(result, size, corpus, exercises)
                if row is None:
                    continue
                value, low, high = (100 * row[name] for name in ("pass_at_1", "low", "high"))
                label = None
                if place == 0 and exercises == "clean":
                    label = "exercises alone" if corpus == "none" else f"{corpus} → exercises"
                shift = -width / 4 if exercises == "none" else width / 8
                wide = width * (0.4 if exercises == "none" else 0.7)
                if corpus == "none":
                    shift, wide = 0.0, width * 0.7
                axes.bar(
                    at + shift,
                    value,
                    wide,
                    color=_COLORS.get(corpus, "#8e5bb5"),
                    alpha=alpha,
                    label=label,
                )
                axes.errorbar(at + shift, value, [[value - low], [high - value]], color="#222",
                              linewidth=1, capsize=2)  # fmt: skip
    axes.set_xticks(range(len(sizes)), [f"{size} parameters" for size in sizes])
    axes.set_ylabel(f"pass@1 on {result['problems']} unseen problems, %")
    axes.set_ylim(0, 100)
    axes.set_title(
        "Pretraining corpus and exercises at equal total tokens (pale: without exercises)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table of scores: one line per corpus and exercises, one column per size."""
    sizes = _sizes(result)
    pairs = dict.fromkeys((row["corpus"], row["exercises"]) for row in result["arms"])
    table = [["pretraining", "exercises", *sizes]]
    for corpus, exercises in pairs:
        cells = []
        for size in sizes:
            row = _arm(result, size, corpus, exercises)
            cells.append(
                "" if row is None
                else f"{row['pass_at_1']:.1%} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
            )  # fmt: skip
        table.append([corpus, exercises, *cells])
    return table


def _group_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Scores by group of problems at the largest size, mean over seeds."""
    largest = _sizes(result)[-1]
    sums: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for row in result["rows"]:
        if row["size"] == largest:
            sums.setdefault((row["corpus"], row["exercises"]), []).append(row["by_group"])
    names = list(next(iter(sums.values()))[0])
    table = [["pretraining", "exercises", *names]]
    for (corpus, exercises), found in sums.items():
        means = [sum(part[name] for part in found) / len(found) for name in names]
        table.append([corpus, exercises, *(f"{mean:.0%}" for mean in means)])
    return table


def _claim_rows(result: Mapping[str, Any]) -> list[list[str]]:
    table = [["claim", "size", "points", "tasks gained : lost", "p (McNemar)", "intervals"]]
    for row in result["comparisons"]:
        table.append(
            [
                row["claim"] + f" ({row['arm'][1]})" * (row["claim"].startswith("exercises")),
                row["arm"][0],
                f"{row['points']:+.1f}",
                f"{row['gained']} : {row['lost']}",
                f"{row['p']:.2g}",
                "disjoint" if row["disjoint"] else "overlap",
            ]
        )
    return table


def _facts(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    filter_labels = (
        "labels for the filter: a stated rule over signals (tools/reproduce/labels.py), no model"
        if result["labels"] == "rule"
        else "labels for the filter: given by a language model"
    )
    return [
        f"command: `{result['command']}`",
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}",
        f"machine: {machine['cpu']}, {machine['cores']} cores",
        f"{result['cpu_seconds'] / 3600:.2f} processor hours in all",
        f"tokens per model: {result['pretraining_tokens'] + result['exercise_tokens']:,}, of which "
        f"{result['exercise_tokens']:,} exercises where there are any after pretraining",
        filter_labels,
        f"canonical solutions: {result['canonical_passed']} of {result['problems']} pass",
        f"training documents that decontamination against the suite rejects: {result['leaks']}",
    ]


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sections(result: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    paper = [["model of the paper", "HumanEval pass@1"], *([n, f"{v:g}%"] for n, v in PAPER)]
    return [
        ("Scores", _rows(result)),
        ("What follows", _claim_rows(result)),
        ("By group of problems, largest size", _group_rows(result)),
        ("The paper's figures", paper),
    ]


def _markdown(result: Mapping[str, Any]) -> str:
    parts = ["# phi-1's claim in a small world", "![scores by size and corpus](figure.png)"]
    for title, table in _sections(result):
        parts += [f"## {title}", _markdown_table(table)]
    parts += ["## What differs from the paper", DIFFERENCES, "## How it was made"]
    parts.append("\n".join(f"- {fact}" for fact in _facts(result)))
    best = next((name for name in reversed(result["rerun"]) if f"_{BEST}_clean_" in name), None)
    if best is not None:
        commands = "\n".join(result["rerun"][best])
        parts.append(f"One model again, once its data are there:\n\n```bash\n{commands}\n```")
    return "\n\n".join(parts) + "\n"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>phi-1's claim in a small world</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }}
img {{ max-width: 100% }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: left }}
code {{ background: #f3f3f3; padding: 0 .2rem; overflow-wrap: anywhere }}
</style>
<h1>phi-1's claim in a small world</h1>
<img src="data:image/png;base64,{image}" alt="scores by size and corpus">
{sections}
<h2>What differs from the paper</h2><p>{differences}</p>
<h2>How it was made</h2><ul>{facts}</ul>
</html>
"""


def _html(result: Mapping[str, Any], image: bytes) -> str:
    sections = []
    for title, (head, *body) in _sections(result):
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in body
        )
        table = f"<div class=wide><table><tr>{cells}</tr>{lines}</table></div>"
        sections.append(f"<h2>{html.escape(title)}</h2>{table}")
    facts = "".join(f"<li>{html.escape(fact.replace('`', ''))}</li>" for fact in _facts(result))
    return _PAGE.format(
        image=base64.b64encode(image).decode(),
        sections="\n".join(sections),
        differences=html.escape(DIFFERENCES),
        facts=facts,
    )
