"""Scores of a run's checkpoints over its training tokens, once or for as long as it trains.

A follower is a process of its own, on any machine that sees the run's directory: it reads published
checkpoints and writes next to them, so that nothing it does or suffers can reach the training. What
it has scored is on the disk; killed and started again, it continues with what is missing.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaphi.durable import write_durably
from megaphi.errors import RunError
from megaphi.formats.manifest import CheckpointError, find_checkpoints, verify_checkpoint
from tools.evaluation.report import draw

SCORES_NAME = "scores.jsonl"
# What one checkpoint's evaluation may have otherwise than another's on the same curve.
_OWN_KEYS = ("model", "weights_sha256", "training_tokens")


@dataclass(frozen=True)
class Progress:
    """Where the training stood at a checkpoint."""

    step: int
    tokens: int
    """Consumed so far."""


def progress_of(checkpoint: Path) -> Progress | None:
    """Where the training stood; None for weights that were converted and are from no training."""
    from megaphi.formats.files import read_json_object

    if not all((checkpoint / name).is_file() for name in ("trainer.json", "config.yaml")):
        return None
    state = read_json_object(checkpoint / "trainer.json")
    recipe = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    tokens = int(state["consumed_samples"]) * int(recipe["data"]["sequence_length"])
    return Progress(int(state["step"]), tokens)


@dataclass
class Curve:
    """The scores of a run on one suite.

    Args:
        run_dir: the run.
        out: where each checkpoint's evaluation has a directory of its checkpoint's name.
        suite_name: names the curve in TensorBoard.
        evaluate: evaluates a checkpoint into a directory, or continues with what is there; returns
            the summary that it leaves there as summary.json.
        every_steps: only checkpoints of steps that this divides, and the last.
    """

    run_dir: Path
    out: Path
    suite_name: str
    evaluate: Callable[[Path, Path], dict[str, Any]]
    every_steps: int = 1

    def __post_init__(self) -> None:
        self._passed_over: set[str] = set()
        self._ended = False

    def score_all(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Evaluate the checkpoints that are there, oldest first; results so far cost nothing.

        Yields:
            Each checkpoint and its summary.
        """
        for checkpoint in find_checkpoints(self.run_dir)[::-1]:
            if checkpoint.name in self._passed_over:
                continue
            last = self._is_last(checkpoint)
            try:
                summary = self._score(checkpoint, last)
            except (CheckpointError, FileNotFoundError) as error:
                reason = str(error)
                if not checkpoint.exists():
                    reason = f"{checkpoint.name} was removed before it was scored"
                elif isinstance(error, FileNotFoundError):
                    raise
                print(f"megaphi: skipping a checkpoint: {reason}", file=sys.stderr)
                summary = None
            self._passed_over.add(checkpoint.name)
            self._ended = self._ended or last
            if summary is not None:
                yield checkpoint, summary

    def _score(self, checkpoint: Path, last: bool) -> dict[str, Any] | None:
        """Evaluate one, unless `every_steps` passes it over, which the last is spared."""
        verify_checkpoint(checkpoint)
        progress = progress_of(checkpoint)
        if progress is None:
            raise CheckpointError(f"{checkpoint}: does not say on how many tokens it was trained")
        if progress.step % self.every_steps != 0 and not last:
            return None
        return self.evaluate(checkpoint, self.out / checkpoint.name)

    def _is_last(self, checkpoint: Path) -> bool:
        """Whether the training ends here: by the run's recipe, which may have got more steps."""
        for folder in (self.run_dir, checkpoint):
            if (folder / "config.yaml").is_file():
                recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
                steps = int(recipe["train"]["steps"])
                return int(checkpoint.name.removeprefix("step-")) >= steps
        return False

    def points(self, summary: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Tokens and summaries of all evaluations that were made as this one was, in order.

        Those of checkpoints that the training has since removed are among them.
        """
        found = []
        for path in self.out.glob("step-*/summary.json"):
            other = json.loads(path.read_bytes())
            settings = json.loads((path.parent / "settings.json").read_bytes())
            alike = all(
                summary.get(key) == value for key, value in settings.items() if key not in _OWN_KEYS
            )
            if alike and other["training_tokens"] is not None:
                found.append((other["training_tokens"], other))
        return sorted(found, key=lambda point: point[0])

    def record(self, summary: Mapping[str, Any], *, tensorboard: bool) -> list[dict[str, Any]]:
        """Write scores.jsonl, and the curve into the run's TensorBoard; returns the scores."""
        points = self.points(summary)
        scores = [{"tokens": tokens, "pass@k": point["pass@k"]} for tokens, point in points]
        text = "".join(json.dumps(score) + "\n" for score in scores)
        write_durably(self.out / SCORES_NAME, text)
        if tensorboard:
            draw(self.run_dir, self.suite_name, points)
        return scores

    def follow(
        self, poll_seconds: float, patience_seconds: float = math.inf
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Evaluate checkpoints as they are published, until the training's last; see `score_all`.

        A run that has no checkpoint yet, or no directory, is waited for, and that is announced: its
        name may be wrong. One that has begun, and in which nothing changes for `patience_seconds`,
        is taken for dead.

        Raises:
            RunError: the run seems dead.
        """
        announced = None
        signs, seen_alive = self._signs_of_life(), time.monotonic()
        while True:
            yield from self.score_all()
            if self._ended:
                return
            now = self._signs_of_life()
            if now != signs:
                signs, seen_alive = now, time.monotonic()
            elif signs and time.monotonic() - seen_alive > patience_seconds:
                raise RunError(
                    f"{self.run_dir}: nothing has changed in it for {patience_seconds:g} s, and "
                    "its last checkpoint is not there; when it trains again, start me again"
                )
            seen = max(self._passed_over, default=None)
            waits = f"for a checkpoint after {seen}" if seen else "for its first checkpoint"
            if announced != waits:
                missing = "" if self.run_dir.is_dir() else " (there is no such directory yet)"
                print(
                    f"megaphi: {self.run_dir}{missing}: waiting {waits}",
                    file=sys.stderr,
                    flush=True,
                )
                announced = waits
            time.sleep(poll_seconds)

    def _signs_of_life(self) -> list[tuple[str, int, int]]:
        """Name, length and time of what a training changes while it runs.

        Its lock is not tried: a training that starts just then would be refused.
        """
        paths = [self.run_dir / "metrics.jsonl", *self.run_dir.glob("heartbeats/*")]
        paths += find_checkpoints(self.run_dir)
        found = []
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((path.name, status.st_size, status.st_mtime_ns))
        return found
