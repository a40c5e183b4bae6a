"""Learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from megaphi.config import Recipe

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""By `schedule.shape`: the share of the way from the lowest rate (0) to the peak (1) at which the
rate is, when this part of the decay (from 0 to 1) is done."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Rises linearly from 0 to the peak over `warmup_steps`, then falls as `DECAYS` says to
    `minimum_fraction` of the peak at `decay_steps`, and stays there.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    end = schedule.decay_steps or recipe.train.steps
    # a run shorter than its warm-up has nothing to decay
    length = max(1, end - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    share = DECAYS[schedule.shape](progress)
    if share == 1.0:
        return peak
    return peak * (schedule.minimum_fraction + (1.0 - schedule.minimum_fraction) * share)
