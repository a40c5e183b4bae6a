"""The plots of `megaphi bench kernels` and `megaphi bench train`, drawn by matplotlib."""

import importlib.util
from pathlib import Path
from typing import Any

from tools.bench.train.profile import CATEGORIES


def plot(report: dict[str, Any], path: Path) -> str | None:
    """Draw a report.

    Returns:
        Why there is no plot; None where there is one.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install 'megaphi[plot]')"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if "groups" in report:
        draw, size = draw_kernels, (10.0, 0.4 + 0.28 * max(8, len(kernel_bars(report))))
    elif report["settings"]["curve"]:
        draw, size = draw_curves, (9.0, 5.5)
    else:
        draw, size = draw_speed, (12.0, 1.6 + 0.45 * max(4, len(report["rows"])))
    if not any("problem" not in row for row in _all_rows(report)):
        return "no plot: nothing was measured"
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, report)
    machine = report["machine"]
    gpus = [gpu["name"] for gpu in machine["gpus"]] or [machine["cpu"] or "unknown CPU"]
    figure.suptitle(f"{gpus[0]}, commit {(machine['commit'] or 'unknown')[:12]}", fontsize=9)
    figure.savefig(path, dpi=110)
    return None


def _all_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row of a report of either kind."""
    if "groups" not in report:
        return list(report["rows"])
    return [row for group in report["groups"] for row in group["rows"]]


def kernel_bars(report: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Operation, implementation and share of the ceiling of every measured row."""
    bars = []
    for group in report["groups"]:
        for row in group["rows"]:
            if "passes" in row:
                entry = row["passes"].get("both") or row["passes"]["forward"]
                bars.append((group["name"], row["provider"], entry["share"]))
    return bars


def draw_kernels(figure: Any, report: dict[str, Any]) -> None:
    """A bar an implementation: how much of what the memory or the matrix units allow it reaches."""
    bars = kernel_bars(report)
    axes = figure.add_subplot()
    colours = {"eager": "tab:gray", "compile": "tab:orange", "triton": "tab:blue"}
    places = range(len(bars))
    axes.barh(
        places,
        [100 * share for _, _, share in bars],
        color=[colours.get(provider, "tab:green") for _, provider, _ in bars],
    )
    axes.set_yticks(places, [f"{name}: {provider}" for name, provider, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured ceiling (copy or matrix product), forward + backward")
    axes.grid(axis="x", alpha=0.3)


def _label(row: dict[str, Any]) -> str:
    chosen = row["configuration"]
    return f"{row['name']}, batch {chosen['micro_batch']}, dropout {chosen['dropout']:g}"


def draw_speed(figure: Any, report: dict[str, Any]) -> None:
    """Tokens a second of every configuration, and alongside it where a step's time goes."""
    rows = [row for row in report["rows"] if "problem" not in row]
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))
    colours = ["tab:orange" if row["configuration"]["peer"] else "tab:blue" for row in rows]
    left.barh(places, [row["tokens_per_second"] for row in rows], color=colours)
    left.set_yticks(places, [_label(row) for row in rows], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("tokens/s")
    left.grid(axis="x", alpha=0.3)
    begins = [0.0] * len(rows)
    for kind in CATEGORIES:
        widths = [row["profile"]["ms"][kind] if "profile" in row else 0.0 for row in rows]
        right.barh(places, widths, left=begins, label=kind)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    right.set_xlabel("ms a step, profiled")
    right.legend(fontsize=7)


def draw_curves(figure: Any, report: dict[str, Any]) -> None:
    """Losses over steps, and their differences from the first configuration."""
    rows = [row for row in report["rows"] if "problem" not in row]
    above, below = figure.subplots(2, 1, sharex=True)
    for row in rows:
        steps = range(1, len(row["losses"]) + 1)
        above.plot(steps, row["losses"], label=_label(row), linewidth=1)
        pairs = zip(row["losses"], rows[0]["losses"], strict=True)
        below.plot(steps, [ours - base for ours, base in pairs], linewidth=1)
    above.set_ylabel("loss")
    above.legend(fontsize=7)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.grid(alpha=0.3)
