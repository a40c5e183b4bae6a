"""pass@k: the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), with an interval.

The interval is Wilson's score interval at 95 % with the problems as the trials: it says how far the
score could be off because the suite has only so many problems. It holds at 0 % and 100 % too, where
a bootstrap has no width. With several samples a problem the values lie between 0 and 1 and vary
less than coin throws, so it is then on the safe side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A mean over problems, and where it may lie."""

    value: float
    low: float
    high: float
    problems: int

    def __str__(self) -> str:
        """For people: `49.4 % (41.9 to 56.9)`."""
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.1f} % ({low:.1f} to {high:.1f})"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of k of the samples passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k is not between 1 and the number of samples, or more passed than there are.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {samples} samples of which {passed} passed")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def wilson(mean: float, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 %."""
    square = _Z_95**2 / trials
    centre = (mean + square / 2) / (1 + square)
    width = _Z_95 * math.sqrt(mean * (1 - mean) / trials + square / (4 * trials)) / (1 + square)
    return max(0.0, centre - width), min(1.0, centre + width)


def score(outcomes: Mapping[str, Sequence[bool]], k: int) -> Score | None:
    """The score of problems by the outcomes of their samples; None if one has fewer than k."""
    if not outcomes or min(map(len, outcomes.values())) < k:
        return None
    values = [pass_at_k(len(flags), sum(flags), k) for flags in outcomes.values()]
    mean = min(1.0, max(0.0, math.fsum(values) / len(values)))
    return Score(mean, *wilson(mean, len(values)), len(values))
