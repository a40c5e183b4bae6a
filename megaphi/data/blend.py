"""Megatron's BlendedDataset: several token files mixed in fixed proportions, sample by sample.

For each output position the data set that is furthest behind its share gives its next sample:
the largest `weight * max(position, 1) - taken`, in float64, ties to the first data set. Megatron
walks the positions one by one in C++. Here thousands of stretches of the output are walked in
step by numpy, each from a guessed start, and redone until each starts where the one before it
ended: the result is that of the walk, bit for bit (see `walk`).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megaphi.data.dataset import SPLITS, GPTDataset, split_ranges
from megaphi.data.indexed import IndexedDataset

_MAX_DATASETS = 32_766  # data set numbers are int16, and Megatron asks for fewer than 32,767
_SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: spare samples built in each data set
WALK_CELLS = 1 << 21  # stretches x data sets held at once: 16 MiB of float64

BlendOrder = tuple[NDArray[np.int16], NDArray[np.int64]]


def blend_order(weights: Sequence[float] | NDArray[np.float64], size: int) -> BlendOrder:
    """Mix data sets in proportion to weights.

    Args:
        weights: share of each data set; they sum to 1 and are used to the last bit as given.
        size: number of samples.

    Returns:
        int16 [size], the data set of each position, and int64 [size], which of its samples.

    Raises:
        ValueError: the weights are not positive shares of 1, or there are too many.
    """
    shares = _checked_weights(weights)
    if not math.isclose(float(shares.sum()), 1.0, rel_tol=1e-6):
        raise ValueError(f"blend weights must sum to 1, not {float(shares.sum())}")
    dataset_index = walk(shares, size, None)
    return dataset_index, _running_counts(dataset_index)


def exhaustive_order(sizes: Sequence[int] | NDArray[np.int64]) -> BlendOrder:
    """Mix data sets so that every sample of each appears exactly once.

    Args:
        sizes: samples in each data set, above 0.

    Returns:
        int16 and int64 arrays of `sum(sizes)` entries, as `blend_order`.

    Raises:
        ValueError: a size is not positive, or there are too many.
    """
    limits = _checked_weights(sizes)
    total = int(np.sum(np.asarray(sizes, np.int64)))
    dataset_index = walk(limits / float(total), total, limits)
    return dataset_index, _running_counts(dataset_index)


def _checked_weights(weights: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(weights, np.float64)
    if not 1 <= values.size <= _MAX_DATASETS:
        raise ValueError(f"a blend takes 1 to {_MAX_DATASETS} data sets, not {values.size}")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"blend weights must be numbers above 0, not {values.tolist()}")
    return values


def walk(
    weights: NDArray[np.float64], size: int, limits: NDArray[np.float64] | None
) -> NDArray[np.int16]:
    """The greedy choice at every position; data sets that reached their limit are passed over.

    The output is cut into about sqrt(size) stretches. What a stretch chooses follows from how many
    samples each data set has given when it begins. Those counts are guessed (share times position,
    rounded), all stretches are walked side by side, and any that did not begin with the counts the
    one before it ended with is walked again from those. The first begins with zeros, which is
    right, so once all of them join, each equals the plain walk; every round makes at least one
    more of them final, and since the rule soon forgets a wrong start, two rounds usually do.

    Args:
        weights: float64 [K].
        size: positions to fill.
        limits: float64 [K], or None for no limit.

    Returns:
        int16 [size].
    """
    if size == 0:
        return np.empty(0, np.int16)
    stretches = max(1, min(math.isqrt(size), WALK_CELLS // len(weights)))
    steps = -(-size // stretches)
    stretches = -(-size // steps)
    positions = np.arange(stretches, dtype=np.float64) * steps
    starts = guess_counts(weights, positions)
    ends = np.empty_like(starts)
    choices = np.empty((steps, stretches), np.int16)
    todo = np.arange(stretches)
    while todo.size:
        taken = starts[todo]
        position = positions[todo, None]
        rows = np.arange(todo.size)
        for step in range(steps):
            # The same float64 operations as the C++ loop; argmax takes the first of equals.
            lag = weights * np.maximum(position, 1.0) - taken
            if limits is not None:
                lag[taken >= limits] = -np.inf
            choice = lag.argmax(axis=1)
            choices[step, todo] = choice
            taken[rows, choice] += 1.0
            position += 1.0
        ends[todo] = taken
        broken = np.flatnonzero((starts[1:] != ends[:-1]).any(axis=1))
        starts[broken + 1] = ends[broken]
        todo = broken + 1
    return choices.T.reshape(-1)[:size]


def guess_counts(
    weights: NDArray[np.float64], positions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Whole counts near `weights * position` that sum to it: [positions, K], largest remainder."""
    exact = weights * positions[:, None]
    counts = np.floor(exact)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    missing = positions - counts.sum(axis=1)
    return np.asarray(counts + (rank < missing[:, None]))


def _running_counts(dataset_index: NDArray[np.int16]) -> NDArray[np.int64]:
    """How often each entry's value occurred before it: int64, same length."""
    order = np.argsort(dataset_index, kind="stable")
    counts = np.bincount(dataset_index)
    running = np.empty(len(dataset_index), np.int64)
    running[order] = np.arange(len(dataset_index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return running


class BlendedDataset:
    """Samples of several data sets in one order.

    Attributes:
        datasets: the data sets.
        dataset_index: int16 [len], which data set gives sample k.
        dataset_sample_index: int64 [len], which of its samples that is.

    Args:
        datasets: data sets of one sequence length.
        weights: share of each, normalised here; None mixes by their lengths.
        size: number of samples. Without weights it may be None (all samples, each once), and is
            cut to what there is.

    Raises:
        ValueError: weights without a size, or more samples asked of a data set than it has.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float] | None,
        size: int | None,
    ) -> None:
        lengths = [len(dataset) for dataset in datasets]
        if weights is not None and size is None:
            raise ValueError("blend weights need a number of samples")
        if weights is not None and len(weights) != len(datasets):
            raise ValueError(f"{len(weights)} blend weights for {len(datasets)} data sets")
        self.datasets = list(datasets)
        if size is None:
            self.dataset_index, self.dataset_sample_index = exhaustive_order(lengths)
        else:
            shares = _checked_weights(lengths if weights is None else weights)
            size = min(size, sum(lengths)) if weights is None else size
            order = blend_order(shares / np.sum(shares), size)
            self.dataset_index, self.dataset_sample_index = order
        wanted = np.bincount(self.dataset_index, minlength=len(lengths)).tolist()
        for dataset, have, want in zip(datasets, lengths, wanted, strict=True):
            if want > have:
                raise ValueError(
                    f"{dataset.indexed.prefix}: the blend wants {want} samples, it has {have}"
                )

    def __len__(self) -> int:
        """Samples in the blend."""
        return len(self.dataset_index)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """Sample `k`: int64 [S + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= k < len(self):
            raise IndexError(f"no sample {k}, the blend has {len(self)}")
        dataset = self.datasets[int(self.dataset_index[k])]
        return dataset[int(self.dataset_sample_index[k])]


def parse_blend(value: str | Sequence[str | float]) -> list[tuple[float | None, str]]:
    """Read a blend by the rule of Megatron's `--data-path`.

    Args:
        value: a prefix, a text such as "0.7 a 0.3 b" (split at blanks), or a list of prefixes or
            of alternating weights and prefixes. A prefix with a blank must stand in a list.

    Returns:
        (weight, prefix) pairs; all weights are None when none was given.

    Raises:
        ValueError: weights and prefixes do not alternate, a weight is not above 0, or a prefix
            looks like a number (Megatron would take it for a weight; write "./2024").
    """
    items = value.split() if isinstance(value, str) else [str(item).strip() for item in value]
    if not items or not all(items):
        raise ValueError(f"{value!r}: expected at least one token file prefix")
    numbers = [_number(item) for item in items]
    if not any(number is not None for number in numbers):
        return [(None, prefix) for prefix in items]
    weights, prefixes = numbers[0::2], items[1::2]
    if len(items) % 2 or None in weights or any(n is not None for n in numbers[1::2]):
        raise ValueError(
            f"{' '.join(items)!r}: expected prefixes only, or weight prefix weight prefix …; "
            "write ./2024 for a prefix that looks like a number"
        )
    for weight in weights:
        if weight is None or not 0 < weight < math.inf:
            raise ValueError(f"{' '.join(items)!r}: weight {weight} must be above 0")
    return list(zip(weights, prefixes, strict=True))


def _number(text: str) -> float | None:
    """The text as Python's float would read it (as Megatron does), or None."""
    try:
        return float(text)
    except ValueError:
        return None


def build_dataset(
    value: str | Sequence[str | float],
    *,
    split: str | None,
    which: Literal["train", "valid", "test"] = "train",
    num_samples: int | None,
    sequence_length: int,
    seed: int,
) -> GPTDataset | BlendedDataset:
    """Build the data set that Megatron's BlendedMegatronDatasetBuilder would.

    Args:
        value: see `parse_blend`.
        split: Megatron's `--split` over every prefix (its `--data-path`); None uses whole files
            (its `--train-data-path` and the like, where the weight of a lone prefix is ignored).
        which: the part of the split to build.
        num_samples: samples needed over the whole run; None for one epoch of everything.
        sequence_length: S.
        seed: of the shuffles; the same for every prefix.

    Raises:
        ValueError: the blend or split is wrong, weights without `num_samples`, or a prefix has
            too few tokens.
        FileNotFoundError: no such token file.
        TokenFileError: a token file is broken.
    """
    pairs = parse_blend(value)
    weighted = pairs[0][0] is not None
    if weighted and num_samples is None:
        raise ValueError("blend weights need a number of samples")

    def build(prefix: str, samples: int | None) -> GPTDataset:
        indexed = IndexedDataset(prefix)
        bounds: tuple[int, int] | None = (0, len(indexed))
        if split is not None:
            bounds = split_ranges(split, len(indexed))[SPLITS.index(which)]
        if bounds is None:
            raise ValueError(f"split {split!r} gives nothing to {which}")
        return GPTDataset(
            indexed,
            sequence_ids=range(*bounds),
            num_samples=samples,
            sequence_length=sequence_length,
            seed=seed,
        )

    if len(pairs) == 1 and (split is None or not weighted):
        return build(pairs[0][1], num_samples)
    if not weighted:
        return BlendedDataset([build(prefix, None) for _, prefix in pairs], None, num_samples)
    assert num_samples is not None
    raw = np.array([weight for weight, _ in pairs], np.float64)
    weights = (raw / np.sum(raw)).tolist()
    # Each data set's target is rounded up, so the blend can be a few samples larger than asked.
    targets = [math.ceil(num_samples * weight) for weight in weights]
    datasets = [
        build(prefix, math.ceil(target * (1 + _SURPLUS)))
        for (_, prefix), target in zip(pairs, targets, strict=True)
    ]
    return BlendedDataset(datasets, weights, sum(targets))
