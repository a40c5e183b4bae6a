"""Turns what a step left on the device into a row of metrics, and watches over it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from megaphi.config import Recipe
from megaphi.device import HostCopy, StepTimer, device_name, peak_memory_gib
from megaphi.errors import RunError
from megaphi.metrics.flops import flops_per_token, peak_flops
from megaphi.metrics.logger import RunLogger
from megaphi.parallel.mesh import Mesh
from megaphi.resilience.spikes import Spike, SpikeWatch


@dataclass(frozen=True)
class StepMetrics:
    """One step's metrics while its numbers are still on the device."""

    step: int
    learning_rate: float
    data_seconds: float
    numbers: HostCopy
    """Loss, gradient norm, 1 if the step counted, number of processes asked to stop, loss scale."""


class Reporter:
    """Reads each step one step late, on every process alike; main also writes it down."""

    def __init__(self, recipe: Recipe, mesh: Mesh, dtype: torch.dtype) -> None:
        self.nonfinite_in_a_row = 0
        self.skipped_updates = 0
        self.spike: Spike | None = None
        """The loss spike that the steps reported so far have completed."""
        self._spikes = SpikeWatch(recipe.train)
        self.timer = StepTimer(mesh.device)
        self._recipe = recipe
        self._mesh = mesh
        self._flops = flops_per_token(recipe.model, recipe.data.sequence_length)
        self._peak = peak_flops(device_name(mesh.device), dtype)
        self._smoothed_seconds: float | None = None
        self._has_loss_scale = dtype == torch.float16

    def report(self, metrics: StepMetrics | None, logger: RunLogger | None) -> bool:
        """Write a step's row; return whether any process was asked to stop.

        Raises:
            RunError: too many steps in a row were not finite.
        """
        if metrics is None:
            return False
        loss, norm, counted, asked, scale = metrics.numbers.values()
        seconds = self.timer.seconds()
        if logger is not None:
            row = self._row(metrics, loss, norm, seconds)
            if self._has_loss_scale:
                row["loss_scale"] = scale
            logger.step(row)
        self.skipped_updates += not counted
        if math.isfinite(loss) and counted and self.spike is None:
            self.spike = self._spikes.add(metrics.step, loss)
        if counted:
            self.nonfinite_in_a_row = 0
        elif scale <= 1.0:
            # above 1, the loss scale was too large and is halved: that is how it finds its value
            self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= self._recipe.train.max_nonfinite_steps:
            raise RunError(
                f"step {metrics.step}: the gradient was not finite for "
                f"{self.nonfinite_in_a_row} steps in a row (train.max_nonfinite_steps); the last "
                "checkpoint is from before or has the weights unchanged. Lower "
                "optimizer.learning_rate, or look at the samples of these steps"
            )
        return asked > 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, after the step it is of was reported."""
        return {
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "skipped_updates": self.skipped_updates,
            "spikes": self._spikes.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped."""
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.skipped_updates = state["skipped_updates"]
        self._spikes.load_state(state["spikes"])

    def _row(
        self, metrics: StepMetrics, loss: float, norm: float, seconds: float
    ) -> dict[str, float | int | None]:
        """One object of metrics.jsonl."""
        recipe, step = self._recipe, metrics.step
        tokens = recipe.train.global_batch_size * recipe.data.sequence_length
        rate = tokens / seconds / self._mesh.size
        old = self._smoothed_seconds
        self._smoothed_seconds = seconds if old is None else 0.9 * old + 0.1 * seconds
        return {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": metrics.learning_rate,
            "consumed_samples": step * recipe.train.global_batch_size,
            "tokens_per_second_per_gpu": rate,
            "mfu": None if self._peak is None else rate * self._flops / self._peak,
            "seconds": seconds,
            "data_wait": metrics.data_seconds / seconds,
            "memory_gib": peak_memory_gib(self._mesh.device),
            "eta_seconds": (recipe.train.steps - step) * self._smoothed_seconds,
        }
