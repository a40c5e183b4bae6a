"""Learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megaphi.config import Recipe


@dataclass(frozen=True)
class Position:
    """Where a step is in the decay."""

    step: int
    """From `start` to `end`; all steps after `end` count as `end`."""
    start: int
    """Last step of the warm-up, 0 without one."""
    end: int
    """Step at which the decay ends, above `start`."""

    @property
    def progress(self) -> float:
        """Part of the decay that is done, 0 to 1."""
        return (self.step - self.start) / (self.end - self.start)


DECAYS: dict[str, Callable[[Position], float]] = {
    "linear": lambda at: 1.0 - at.progress,
    "cosine": lambda at: 0.5 * (1.0 + math.cos(math.pi * at.progress)),
    "constant": lambda at: 1.0,
}
"""By `schedule.shape`: the share of the way from the lowest rate (0) to the peak (1) at which the
rate is at a position."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Rises linearly from 0 to the peak over `warmup_steps`, then falls as `DECAYS` says until
    `decay_steps`, and stays there. A share of 0 is `minimum_fraction` of the peak.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    start = schedule.warmup_steps
    if step <= start:
        return peak * step / start
    # a run shorter than its warm-up has nothing to decay
    end = max(start + 1, schedule.decay_steps or recipe.train.steps)
    share = DECAYS[schedule.shape](Position(min(step, end), start, end))
    if share == 1.0:
        return peak
    return peak * (schedule.minimum_fraction + (1.0 - schedule.minimum_fraction) * share)
