"""`megaphi inspect RUN --plot FILE.png`: a run's curves, with everything that interrupted it."""

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaphi.metrics.logger import METRICS_NAME, metric_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("loss", "loss", "log"),
    ("grad_norm", "gradient norm", "log"),
    ("lr", "learning rate", "linear"),
    ("tokens_per_second_per_gpu", "tokens/s a process", "linear"),
)
_EVENT_COLOURS = ("tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_SMOOTHED = 400  # steps from which a running median is drawn over the single steps


@dataclass
class Curves:
    """What `metrics.jsonl` says, ready to draw.

    Attributes:
        steps: [(step, row)] of the training steps.
        validation: [(step, loss)].
        events: kind of event -> steps after which it happened; `skipped` are the steps whose
            update was left out because the loss or a gradient was not finite.
    """

    steps: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    events: dict[str, list[int]] = field(default_factory=dict)

    def of(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number, where it is known."""
        known = [(step, row[key]) for step, row in self.steps if row.get(key) is not None]
        return [step for step, _ in known], [value for _, value in known]


def read_curves(run_dir: Path) -> Curves:
    """Read a run's metrics.

    Raises:
        FileNotFoundError: there are none.
        ValueError: no step is in them.
    """
    path = run_dir / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, so there is nothing to plot")
    curves = Curves()
    for _, row in metric_rows(path):
        step = row["step"]
        if "event" in row:
            curves.events.setdefault(row["event"], []).append(step)
        elif row.get("validation_loss") is not None:
            curves.validation.append((step, row["validation_loss"]))
        elif "loss" in row:
            curves.steps.append((step, row))
            if row["loss"] is None or row.get("grad_norm") is None:
                curves.events.setdefault("skipped", []).append(step)
    if not curves.steps:
        raise ValueError(f"{path}: no step is in it yet, so there is nothing to plot")
    return curves


def plot_run(run_dir: Path, path: Path) -> dict[str, Any]:
    """Draw a run's curves.

    Args:
        run_dir: the run.
        path: file to write; its suffix names the format (.png, .svg, .pdf).

    Returns:
        `plot`, and under `events` the kind and number of what is marked.

    Raises:
        FileNotFoundError, ValueError: see `read_curves`; or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'megaphi[plot]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(run_dir)
    figure = Figure(figsize=(11.0, 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Sequence[Axes] = figure.subplots(len(_PANELS), 1, sharex=True, height_ratios=(3, 2, 1, 2))
    for panel, (key, label, scale) in zip(axes, _PANELS, strict=True):
        _draw(panel, *curves.of(key), noisy=key != "lr")
        panel.set_ylabel(label)
        panel.set_yscale(scale)
        panel.grid(alpha=0.25)
    if curves.validation:
        axes[0].plot(*zip(*curves.validation, strict=True), "o-", color="tab:orange", ms=3)
        axes[0].plot([], [], "o-", color="tab:orange", ms=3, label="validation loss")
    _mark(axes, curves.events)
    axes[-1].set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[0].legend(handles, labels, loc="upper right", fontsize=8)
    figure.suptitle(str(run_dir), fontsize=9)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise ValueError(f"--plot {path}: {error}") from None
    return {
        "plot": str(path),
        "events": {kind: len(steps) for kind, steps in sorted(curves.events.items())},
    }


def _draw(panel: "Axes", steps: list[int], values: list[float], *, noisy: bool) -> None:
    """Single steps; over many noisy ones also a running median."""
    many = noisy and len(values) >= _SMOOTHED
    panel.plot(steps, values, lw=0.6 if many else 1.0, alpha=0.4 if many else 1.0, color="tab:blue")
    if many:
        half = len(values) // 100
        smooth = [
            statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))
        ]
        panel.plot(steps, smooth, lw=1.4, color="tab:blue")


def _mark(axes: Sequence["Axes"], events: dict[str, list[int]]) -> None:
    """A line through all panels for each event, and a name for each kind in the legend."""
    for number, (kind, steps) in enumerate(sorted(events.items())):
        colour = _EVENT_COLOURS[number % len(_EVENT_COLOURS)]
        for panel in axes:
            for step in steps:
                panel.axvline(step, color=colour, lw=0.9, ls="--", alpha=0.7)
        axes[0].plot([], [], "--", color=colour, label=f"{kind} ({len(steps)})")
