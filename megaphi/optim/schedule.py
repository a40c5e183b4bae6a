"""Learning rate as a pure function of the step."""

import math

from megaphi.config import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Rises linearly from 0 to the peak over `warmup_steps`, then falls linearly or by half a cosine
    to `minimum_fraction` of the peak at `decay_steps`, and stays there.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.shape == "constant":
        return peak
    end = schedule.decay_steps or recipe.train.steps
    # a run shorter than its warm-up has nothing to decay
    length = max(1, end - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    if schedule.shape == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.minimum_fraction + (1.0 - schedule.minimum_fraction) * share)
