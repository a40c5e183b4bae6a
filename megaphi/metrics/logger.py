"""What a run reports: metrics.jsonl, TensorBoard, and one line on the console.

Only the main process has a logger. `metrics.jsonl` has one object a step (step, loss, grad_norm,
lr, consumed_samples, tokens_per_second_per_gpu, mfu, seconds, …), one for every evaluation
(step, validation_loss), and one for each event after a step: {"step": 1200, "event": "resume", …}
or "rewind".
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaphi.config import Recipe
from megaphi.durable import write_durably
from megaphi.errors import RunError

METRICS_NAME = "metrics.jsonl"


def metric_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a metrics file, as they are and as objects; none if there is no file.

    A line that a killed run left torn, or that is no row of ours, is passed over.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line.rstrip(b"\n"), row


def has_evaluation(run_dir: Path, step: int) -> bool:
    """Whether a run's metrics have the validation loss of a step."""
    rows = metric_rows(run_dir / METRICS_NAME)
    return any("validation_loss" in row and row["step"] == step for _, row in rows)


def last_step(run_dir: Path) -> int:
    """The last step that a run has reported, 0 without any."""
    return max((row["step"] for _, row in metric_rows(run_dir / METRICS_NAME)), default=0)


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run will write again, and a torn last line."""
    if not path.is_file():
        return
    kept = [line.decode() + "\n" for line, row in metric_rows(path) if row["step"] <= step]
    write_durably(path, "".join(kept))


def _json_number(value: float | None) -> float | None:
    """JSON has no NaN or infinity; they become null."""
    return value if value is None or math.isfinite(value) else None


def format_count(value: float) -> str:
    """1234567 -> "1.2M", 22400 -> "22.4k"."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """183600 -> "2d03h", 3720 -> "1h02m", 62 -> "1m02s"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hour}h{minute:02d}m"
    return f"{minute}m{second:02d}s"


def console_line(row: dict[str, Any], total_steps: int) -> str:
    """One steady line for a step's metrics; what is not known prints n/a."""
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    memory = "n/a" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB"
    loss = "non-finite, step skipped" if row["loss"] is None else f"{row['loss']:.3f}"
    norm = "n/a" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"step {row['step']}/{total_steps} | loss {loss} | gnorm {norm} | lr {row['lr']:.1e} | "
        f"{format_count(row['tokens_per_second_per_gpu'])} tok/s/gpu | {mfu} MFU | {memory} | "
        f"data {100 * row['data_wait']:.1f}% | eta {format_duration(row['eta_seconds'])}"
    )


class RunLogger:
    """Writes a run's metrics; `close` when done."""

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int) -> None:
        self._recipe = recipe
        self._total = recipe.train.steps
        self._path = run_dir / METRICS_NAME
        keep_metrics_until(self._path, start_step)
        self._events = [row for _, row in metric_rows(self._path) if "event" in row]
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=start_step, unit="step", leave=False)

    def say(self, message: str) -> None:
        """Print a line for people."""
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def step(self, row: dict[str, Any]) -> None:
        """Record one training step."""
        row = {k: _json_number(v) if isinstance(v, float) else v for k, v in row.items()}
        self._write(row)
        if self._bar is not None:
            self._bar.update()
        last = row["step"] == self._total
        if row["step"] % self._recipe.logging.interval == 0 or row["step"] == 1 or last:
            self.say(console_line(row, self._total))
            self._points("train", row)

    def evaluation(self, step: int, loss: float) -> None:
        """Record one evaluation."""
        row = {"step": step, "validation_loss": _json_number(loss)}
        self._write(row)
        self.say(f"step {step}/{self._total} | validation loss {loss:.3f}")
        self._points("validation", row)

    def event(self, step: int, name: str, **details: Any) -> None:
        """Record that something happened after a step; once, however often the run is resumed."""
        row = {"step": step, "event": name, **details}
        if row not in self._events:
            self._events.append(row)
            self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        """Append one line; a killed run loses at most the line being written.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._path}: step {row['step']} could not be written: {error}; make room, and "
                "run again from the newest checkpoint"
            ) from error

    def _points(self, group: str, row: dict[str, Any]) -> None:
        """Draw a row's numbers over the step."""
        if self._board is None:
            return
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"{group}/{key}", value, row["step"])

    def close(self) -> None:
        """Close the files; what could not be written has been reported."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()
