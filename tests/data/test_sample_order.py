"""Sample order: golden values of megatron-core, and its loop written out, for random inputs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphi.data.dataset import GPTDataset, build_sample_order, share_ranges, split_ranges
from megaphi.data.indexed import IndexedDataset, IndexedDatasetWriter

VECTORS = json.loads((Path(__file__).parents[1] / "assets/megatron_vectors.json").read_text())


def write_tokens(prefix: Path, lengths: Sequence[int]) -> IndexedDataset:
    """Token i of the file has id i, so that a sample shows where it came from."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.arange(writer.num_tokens, writer.num_tokens + length))
    return IndexedDataset(prefix)


def walk_documents(
    lengths: Sequence[int], document_index: Sequence[int], sequence_length: int, num_windows: int
) -> list[list[int]]:
    """The loop of Megatron's helpers.cpp, token counts and all."""
    rows = [[0, 0]]
    slot = offset = 0
    for _ in range(num_windows):
        remaining = sequence_length + 1
        while remaining:
            available = lengths[document_index[slot]] - offset
            remaining -= available
            if remaining <= 0:
                offset += remaining + available - 1
                remaining = 0
            elif slot == len(document_index) - 1:
                offset = lengths[document_index[slot]] - 1
                break
            else:
                slot += 1
                offset = 0
        rows.append([slot, offset])
    return rows


@pytest.mark.parametrize(
    "case", VECTORS["sample_order"], ids=lambda case: f"n{case['num_samples']}"
)
def test_golden_orders(case) -> None:
    lengths = np.array(case["lengths"], np.int32)
    order = build_sample_order(
        lengths, range(len(lengths)), case["num_samples"], case["sequence_length"], case["seed"]
    )
    assert order.document_index.tolist() == case["document_index"]
    assert order.sample_index.tolist() == case["sample_index"]
    assert order.shuffle_index.tolist() == case["shuffle_index"]
    dtypes = [array.dtype for array in order]
    assert dtypes == [np.int32, np.int32, np.uint32]
    assert len(order.document_index) == case["epochs"] * len(lengths)


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    sequence_length=st.integers(1, 9),
    num_samples=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    drop_last=st.booleans(),
)
def test_windows_equal_the_loop(lengths, sequence_length, num_samples, seed, drop_last) -> None:
    total = sum(lengths)
    if total < sequence_length + 1:
        with pytest.raises(ValueError, match=f"has {total} tokens, .* = {sequence_length + 1}"):
            build_sample_order(
                np.array(lengths, np.int32), range(len(lengths)), 1, sequence_length, 0
            )
        return
    order = build_sample_order(
        np.array(lengths, np.int32),
        range(len(lengths)),
        num_samples,
        sequence_length,
        seed,
        drop_last=drop_last,
    )
    documents = order.document_index.tolist()
    epochs = len(documents) // len(lengths)
    needed = 0 if num_samples is None else num_samples * sequence_length + 1
    assert epochs == 1 or (epochs - 1) * total < needed
    assert epochs * total >= needed
    assert sorted(documents) == sorted(list(range(len(lengths))) * epochs)
    windows = (epochs * total - 1) / sequence_length
    num_windows = math.floor(windows) if drop_last else math.ceil(windows)
    assert num_windows >= (num_samples or 1)
    assert sorted(order.shuffle_index.tolist()) == list(range(num_windows))
    if not drop_last and lengths[documents[-1]] == 0 and num_windows > math.floor(windows):
        return  # Megatron's loop goes wrong here; the samples are checked in the next test
    expected = walk_documents(lengths, documents, sequence_length, num_windows)
    assert order.sample_index.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    sequence_length=st.integers(1, 9),
    num_samples=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
    drop_last=st.booleans(),
)
def test_samples_are_the_windows_of_the_stream(
    lengths, sequence_length, num_samples, seed, drop_last, tmp_path_factory
) -> None:
    if sum(lengths) < sequence_length + 1:
        return
    indexed = write_tokens(tmp_path_factory.mktemp("stream") / "t", lengths)
    dataset = GPTDataset(
        indexed,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
        drop_last=drop_last,
    )
    stream = np.concatenate([indexed[i] for i in dataset.document_index])
    for k in range(len(dataset)):
        sample = dataset[k]
        assert sample.dtype == np.int64
        assert sample.shape == (sequence_length + 1,)
        start = int(dataset.shuffle_index[k]) * sequence_length
        expected = stream[start : start + sequence_length + 1].tolist()
        assert len(expected) > 1
        assert sample[: len(expected)].tolist() == expected
        assert sample[len(expected) :].tolist() == [-1] * (sequence_length + 1 - len(expected))


def test_a_last_epoch_of_which_little_is_needed_comes_last() -> None:
    lengths = np.full(50, 20, np.int32)  # 1000 tokens, 99 samples of 10 an epoch
    order = build_sample_order(lengths, range(50), 150, 10, 1)
    assert sorted(order.document_index[:50]) == list(range(50))
    assert sorted(order.document_index[50:]) == list(range(50))
    assert sorted(order.shuffle_index[:99]) == list(range(99))
    mixed = build_sample_order(lengths, range(50), 190, 10, 1)
    assert sorted(mixed.document_index[:50]) != list(range(50))
    assert sorted(mixed.shuffle_index[:99]) != list(range(99))


def test_short_last_window_is_counted_exactly() -> None:
    """Megatron counts in float32 and loses this window."""
    tokens, sequence_length = 50_331_650, 2048
    order = build_sample_order(
        np.array([tokens], np.int32), range(1), None, sequence_length, 1, drop_last=False
    )
    assert len(order.shuffle_index) == 24_577
    assert math.ceil(np.float32(tokens - 1) / np.float32(sequence_length)) == 24_576
    assert order.sample_index[-1].tolist() == [0, tokens - 1]


def test_more_tokens_than_int32_counts() -> None:
    length, sequence_length = 2**31 - 1, 1 << 20
    order = build_sample_order(np.full(3, length, np.int32), range(3), None, sequence_length, 5)
    windows = (3 * length - 1) // sequence_length
    assert order.sample_index.shape == (windows + 1, 2)
    position = windows * sequence_length
    assert order.sample_index[-1].tolist() == list(divmod(position, length))


def test_a_part_of_the_sequences(tmp_path: Path) -> None:
    indexed = write_tokens(tmp_path / "t", [5, 3, 9, 4, 7])
    dataset = GPTDataset(
        indexed, sequence_ids=range(1, 4), num_samples=None, sequence_length=5, seed=3
    )
    tokens = set(np.concatenate([dataset[k] for k in range(len(dataset))]).tolist())
    assert tokens == set(range(5, 21))  # 16 tokens: three windows of 5 and the look-ahead
    with pytest.raises(ValueError, match=r"t \(1 of its 5 sequences\) has 3 tokens, .* = 6"):
        GPTDataset(indexed, sequence_ids=range(1, 2), num_samples=4, sequence_length=5, seed=3)
    for ids in (range(3, 6), np.array([-1, 2])):
        with pytest.raises(ValueError, match="5 sequences"):
            GPTDataset(indexed, sequence_ids=ids, num_samples=4, sequence_length=5, seed=3)
    with pytest.raises(ValueError, match="0 tokens"):
        GPTDataset(indexed, sequence_ids=range(0), num_samples=4, sequence_length=5, seed=3)


@pytest.mark.parametrize(("num_samples", "sequence_length"), [(0, 4), (-3, 4), (5, 0)])
def test_impossible_sizes_are_refused(num_samples: int, sequence_length: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build_sample_order(np.array([50], np.int32), range(1), num_samples, sequence_length, 0)


def test_samples_outside_of_the_data_set(tmp_path: Path) -> None:
    dataset = GPTDataset(
        write_tokens(tmp_path / "t", [30]), num_samples=None, sequence_length=4, seed=0
    )
    assert len(dataset) == len(list(dataset)) == 7
    for k in (-1, 7):
        with pytest.raises(IndexError, match="there are 7"):
            dataset[k]


def test_padding_is_no_token(tmp_path: Path) -> None:
    dataset = GPTDataset(
        write_tokens(tmp_path / "t", [8]),
        num_samples=None,
        sequence_length=5,
        seed=0,
        drop_last=False,
    )
    samples = sorted(dataset[k].tolist() for k in range(2))
    assert samples == [[0, 1, 2, 3, 4, 5], [5, 6, 7, -1, -1, -1]]


@pytest.mark.parametrize(
    ("split", "num_sequences", "expected"),
    [
        ("969, 30, 1", 10_000, [(0, 9690), (9690, 9990), (9990, 10_000)]),
        ("969,30,1", 1001, [(0, 970), (970, 1000), (1000, 1001)]),
        ("1", 7, [(0, 7), None, None]),
        ("99,1,0", 100, [(0, 99), (99, 100), None]),
        ("0/1/0", 3, [None, (0, 3), None]),
        # ties go to the even neighbour: 0.5 * 5 = 2.5 -> 2, 0.5 * 7 = 3.5 -> 4
        ("1,1", 5, [(0, 2), (2, 5), None]),
        ("0.5,0.5", 7, [(0, 4), (4, 7), None]),
    ],
)
def test_splits(split: str, num_sequences: int, expected) -> None:
    assert split_ranges(split, num_sequences) == expected


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("969,30,1", "test gets none of the 500 sequences"),
        ("1,1,1,1", "up to three weights"),
        ("", "up to three weights"),
        ("90%,10%", "up to three weights"),
        ("-1,2", "up to three weights"),
        ("1e-3,1", "up to three weights"),
        ("0,0,0", "at least one above 0"),
        ("1.2.3,1", "could not convert"),
    ],
)
def test_bad_splits_are_refused(split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_ranges(split, 500)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9),
    num_sequences=st.integers(0, 10**7),
)
def test_shares_leave_nothing_out(weights: list[float], num_sequences: int) -> None:
    ranges = share_ranges(weights, num_sequences)
    position = 0
    for part in ranges:
        assert part is not None
        assert part[0] == position
        assert part[1] >= position
        position = part[1]
    assert position == num_sequences
