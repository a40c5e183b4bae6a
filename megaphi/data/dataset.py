"""Megatron's GPTDataset: which tokens make up sample k, as a pure function of its inputs.

The sequences of a split are repeated for as many epochs as needed, shuffled, laid end to end and
cut into windows of `sequence_length` tokens plus one look-ahead token; the windows are shuffled
again. Every draw comes from one `numpy.random.RandomState(seed)` in Megatron's order, so the
samples equal those of Megatron-Core's `gpt_dataset.py` (0.16 to 0.19), including its separately
shuffled last epoch. Megatron walks the documents in C++ and caches the result on disk; here one
cumsum and one searchsorted do, and nothing is cached, so nothing can be stale.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaphi.data.indexed import IndexedDataset

SPLITS = ("train", "valid", "test")
_SEPARATE_EPOCH_BELOW = 0.80  # Megatron: a last epoch used less than this is shuffled on its own


class SampleOrder(NamedTuple):
    """The three index arrays of Megatron's GPTDataset.

    Attributes:
        document_index: int32 [slots], sequence ids of all epochs in shuffled order.
        sample_index: int32 [M + 1, 2], (slot, offset in that sequence) where each window starts;
            int64 where the slots do not fit int32.
        shuffle_index: uint32 [M], the window that sample k shows (int64 from 2^32 - 2 windows).
    """

    document_index: NDArray[np.int32]
    sample_index: NDArray[Any]
    shuffle_index: NDArray[Any]


def share_ranges(weights: Sequence[float], num_sequences: int) -> list[tuple[int, int] | None]:
    """Cut `range(num_sequences)` in proportion to weights, with Megatron's rounding.

    Args:
        weights: shares, not negative, not all 0.
        num_sequences: number of items to cut.

    Returns:
        For each weight its (start, stop), or None for a weight of 0. Ranges follow one another;
        one may be empty.

    Raises:
        ValueError: the weights cannot be shares.
    """
    shares = np.array(weights, np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum() > 0:
        raise ValueError(f"shares must be numbers >= 0, at least one above 0, not {list(weights)}")
    ranges: list[tuple[int, int] | None] = []
    start = 0.0
    for share in (shares / shares.sum()).tolist():
        stop = start + share
        # Python's round goes to the even neighbour on ties, as Megatron's does.
        bounds = (round(start * float(num_sequences)), round(stop * float(num_sequences)))
        ranges.append(bounds if stop > start else None)
        start = stop
    return ranges


def split_ranges(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """Sequence ranges of train, valid and test for Megatron's `--split`, e.g. "969,30,1".

    Args:
        split: one to three weights; missing ones are 0.
        num_sequences: sequences in the token file.

    Returns:
        Three times (start, stop), or None where the weight is 0.

    Raises:
        ValueError: the text is not a split, or a split with weight gets no sequence at all
            (Megatron never returns from that).
    """
    numbers = re.findall(r"[.0-9]+", split)
    if not 1 <= len(numbers) <= len(SPLITS) or re.sub(r"[.0-9]+|[\s,/:]", "", split):
        raise ValueError(f"split {split!r}: expected up to three weights, such as '969,30,1'")
    try:
        weights = [float(number) for number in numbers]
    except ValueError as error:
        raise ValueError(f"split {split!r}: {error}") from error
    weights += [0.0] * (len(SPLITS) - len(weights))
    ranges = share_ranges(weights, num_sequences)
    for name, bounds in zip(SPLITS, ranges, strict=True):
        if bounds is not None and bounds[0] == bounds[1]:
            raise ValueError(
                f"split {split!r}: {name} gets none of the {num_sequences} sequences; "
                "give it a larger share, or 0"
            )
    return ranges


def build_sample_order(
    lengths: NDArray[np.int32],
    ids: range | NDArray[np.integer[Any]],
    num_samples: int | None,
    sequence_length: int,
    seed: int,
    *,
    drop_last: bool = True,
    name: str = "the corpus",
) -> SampleOrder:
    """Compute Megatron's document, sample and shuffle index.

    Args:
        lengths: int32 [N], tokens in every sequence of the token file.
        ids: sequences to use, ascending.
        num_samples: samples needed over the whole run: it sets the number of epochs, and through
            it the order. None means one epoch.
        sequence_length: S; a sample is S + 1 tokens, and neighbours share one.
        seed: of the RandomState.
        drop_last: leave out the last window when it is short.
        name: what to call the tokens in messages.

    Raises:
        ValueError: there are fewer than S + 1 tokens, or an argument is out of range.
    """
    if sequence_length < 1 or (num_samples is not None and num_samples < 1):
        raise ValueError(
            f"{name}: sequence length and samples must be at least 1, "
            f"not {sequence_length} and {num_samples}"
        )
    sequence_ids = np.asarray(ids, np.int32)
    epoch_tokens = int(lengths[sequence_ids].sum(dtype=np.int64))
    if epoch_tokens < sequence_length + 1:
        raise ValueError(
            f"{name} has {epoch_tokens} tokens, but one sample needs sequence length + 1 = "
            f"{sequence_length + 1}; use more data or shorter sequences"
        )
    epochs = 1
    if num_samples is not None:
        epochs = max(1, -(-(num_samples * sequence_length + 1) // epoch_tokens))
    # Windows that the epochs before the last fill; the last epoch is kept apart if little of it
    # is needed, so that it does not displace tokens of the others.
    early_samples = max(0, ((epochs - 1) * epoch_tokens - 1) // sequence_length)
    separate = False
    if num_samples is not None and epochs > 1:
        epoch_samples = (epoch_tokens - 1) // sequence_length
        last_samples = num_samples - early_samples
        assert 0 <= last_samples <= epoch_samples + 1
        separate = last_samples < int(_SEPARATE_EPOCH_BELOW * epoch_samples)

    random = np.random.RandomState(seed)
    document_index = np.tile(sequence_ids, epochs)
    _shuffle_parts(random, document_index, len(sequence_ids) * (epochs - 1) if separate else 0)
    sample_index = _cut_windows(
        lengths[document_index], epochs * epoch_tokens, sequence_length, drop_last
    )
    total = len(sample_index) - 1
    shuffle_index = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    _shuffle_parts(random, shuffle_index, early_samples if separate else 0)
    return SampleOrder(document_index, sample_index, shuffle_index)


def _shuffle_parts(random: np.random.RandomState, values: NDArray[Any], first: int) -> None:
    """Shuffle `values[:first]`, then `values[first:]`, in place; `first` = 0 is one shuffle."""
    if first:
        random.shuffle(values[:first])
    random.shuffle(values[first:])


def _cut_windows(
    slot_lengths: NDArray[np.int32], num_tokens: int, sequence_length: int, drop_last: bool
) -> NDArray[Any]:
    """Where each window starts in the shuffled stream: [M + 1, 2] rows of (slot, offset).

    Row j is the slot that holds the look-ahead token of window j - 1, and that token's offset,
    which is also where window j starts. Empty sequences are stepped over, as Megatron's loop does.
    """
    windows, rest = divmod(num_tokens - 1, sequence_length)
    if rest and not drop_last:
        windows += 1
    index_type = np.int32 if len(slot_lengths) <= np.iinfo(np.int32).max else np.int64
    sample_index = np.zeros((windows + 1, 2), index_type)
    ends = np.cumsum(slot_lengths, dtype=np.int64)
    boundaries = np.arange(1, windows + 1, dtype=np.int64)
    boundaries *= sequence_length
    np.minimum(boundaries, num_tokens - 1, out=boundaries)
    slots = np.searchsorted(ends, boundaries, side="right")
    sample_index[1:, 0] = slots
    sample_index[1:, 1] = boundaries - (ends[slots] - slot_lengths[slots])
    return sample_index


class GPTDataset:
    """Samples of `sequence_length + 1` tokens from one token file, in Megatron's order.

    The order depends on nothing but the lengths, `sequence_ids`, `num_samples`, `sequence_length`
    and `seed`: keep them all over a run, also `num_samples` when it is resumed.

    Attributes:
        indexed: the token file.
        sequence_length: S.
        document_index: see `SampleOrder`.
        sample_index: see `SampleOrder`.
        shuffle_index: see `SampleOrder`.

    Args:
        indexed: the token file.
        sequence_ids: sequences to use (None: all).
        num_samples: samples needed over the whole run; the epochs built hold at least as many,
            often more. None means one epoch.
        sequence_length: S.
        seed: of the shuffles.
        drop_last: leave out a last window of fewer than S + 1 tokens; else it is padded.
        pad_id: fills that window; -1 is no token, so padding cannot be mistaken for text.

    Raises:
        ValueError: too few tokens, or an argument is out of range.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        *,
        sequence_ids: range | NDArray[np.integer[Any]] | None = None,
        num_samples: int | None,
        sequence_length: int,
        seed: int,
        drop_last: bool = True,
        pad_id: int = -1,
    ) -> None:
        ids = np.asarray(range(len(indexed)) if sequence_ids is None else sequence_ids)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(indexed):
            raise ValueError(
                f"{indexed.prefix}: sequence ids {ids.min()} to {ids.max()} asked for, "
                f"but there are {len(indexed)} sequences"
            )
        name = str(indexed.prefix)
        if len(ids) < len(indexed):
            name += f" ({len(ids)} of its {len(indexed)} sequences)"
        self.indexed = indexed
        self.sequence_length = sequence_length
        self._pad_id = pad_id
        self.document_index, self.sample_index, self.shuffle_index = build_sample_order(
            indexed.lengths,
            ids,
            num_samples,
            sequence_length,
            seed,
            drop_last=drop_last,
            name=name,
        )

    def __len__(self) -> int:
        """Samples in the epochs that were built."""
        return len(self.shuffle_index)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """Sample `k`: int64 [S + 1]; inputs are `[:-1]`, labels are `[1:]`.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= k < len(self):
            raise IndexError(f"{self.indexed.prefix}: no sample {k}, there are {len(self)}")
        window = int(self.shuffle_index[k])
        (first, begin), (last, end) = self.sample_index[window : window + 2].tolist()
        sample = np.empty(self.sequence_length + 1, np.int64)
        filled = 0
        for slot in range(first, last + 1):
            length = end + 1 - begin if slot == last else None
            part = self.indexed.get(int(self.document_index[slot]), begin, length)
            sample[filled : filled + len(part)] = part
            filled += len(part)
            begin = 0
        sample[filled:] = self._pad_id
        return sample
