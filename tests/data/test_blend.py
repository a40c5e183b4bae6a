"""Blends: golden values of megatron-core, its greedy loop written out, and the builder's table."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphi.data import blend as blend_module
from megaphi.data.blend import (
    BlendedDataset,
    blend_order,
    build_dataset,
    exhaustive_order,
    parse_blend,
)
from megaphi.data.dataset import GPTDataset
from megaphi.data.indexed import IndexedDataset, IndexedDatasetWriter

VECTORS = json.loads((Path(__file__).parents[1] / "assets/megatron_vectors.json").read_text())


def greedy(
    weights: Sequence[float], size: int, limits: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """The loop of Megatron's helpers.cpp in Python floats, which are C's doubles."""
    taken = [0] * len(weights)
    dataset_index, dataset_sample_index = [], []
    for position in range(size):
        best, largest = -1, -math.inf
        for k, weight in enumerate(weights):
            if limits is not None and taken[k] == limits[k]:
                continue
            lag = float(weight) * float(max(position, 1)) - float(taken[k])
            if lag > largest:
                best, largest = k, lag
        dataset_index.append(best)
        dataset_sample_index.append(taken[best])
        taken[best] += 1
    return dataset_index, dataset_sample_index


def normalised(weights: Sequence[float]) -> list[float]:
    values = np.array(weights, np.float64)
    return (values / values.sum()).tolist()


def assert_blend(weights: Sequence[float], size: int) -> None:
    dataset_index, dataset_sample_index = blend_order(weights, size)
    assert (dataset_index.dtype, dataset_sample_index.dtype) == (np.int16, np.int64)
    assert (dataset_index.tolist(), dataset_sample_index.tolist()) == greedy(weights, size)


def assert_exhaustive(sizes: Sequence[int]) -> None:
    total = sum(sizes)
    dataset_index, dataset_sample_index = exhaustive_order(sizes)
    assert (dataset_index.dtype, dataset_sample_index.dtype) == (np.int16, np.int64)
    expected = greedy([size / float(total) for size in sizes], total, sizes)
    assert (dataset_index.tolist(), dataset_sample_index.tolist()) == expected


@pytest.mark.parametrize("case", VECTORS["blend"])
def test_golden_blends(case) -> None:
    order = blend_order(case["weights"], case["size"])
    assert [array.tolist() for array in order] == [
        case["dataset_index"],
        case["dataset_sample_index"],
    ]


@pytest.mark.parametrize("case", VECTORS["exhaustive"])
def test_golden_exhaustive_blends(case) -> None:
    order = exhaustive_order(case["sizes"])
    assert [array.tolist() for array in order] == [
        case["dataset_index"],
        case["dataset_sample_index"],
    ]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(1e-9, 1) | st.integers(1, 4), min_size=1, max_size=9),
    size=st.integers(0, 3000),
)
def test_blends_equal_the_loop(weights: list[float], size: int) -> None:
    assert_blend(normalised(weights), size)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 5) | st.integers(1, 900), min_size=1, max_size=9))
def test_exhaustive_blends_equal_the_loop(sizes: list[int]) -> None:
    assert_exhaustive(sizes)


@pytest.mark.parametrize(
    "weights",
    [
        [1 / 3, 1 / 3, 1 / 3],  # ties everywhere
        [0.1] * 10,  # ties that float64 breaks either way
        [0.5, 0.4999, 1e-4],  # a start guessed wrong is felt for thousands of positions
        [1 - 1e-5 - 1e-9, 1e-5, 1e-9],
        np.random.default_rng(1).dirichlet(np.full(60, 0.1)).tolist(),
    ],
)
def test_long_blends_equal_the_loop(weights: list[float]) -> None:
    assert_blend(normalised(weights), 50_000)


def test_sizes_far_apart_equal_the_loop() -> None:
    assert_exhaustive([1, 29_000, 1, 3, 700, 1])
    assert_exhaustive([7] * 500 + [1] * 500)


@pytest.mark.parametrize("cells", [1, 2, 17, 100_000])
def test_the_cut_into_stretches_does_not_matter(monkeypatch, cells: int) -> None:
    weights = normalised([3, 1, 0.5, 0.01])
    expected = blend_order(weights, 4001)
    monkeypatch.setattr(blend_module, "WALK_CELLS", cells * len(weights))
    for left, right in zip(expected, blend_order(weights, 4001), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("wrong", [-5.0, 3.0, 1e6])
def test_a_bad_guess_does_not_matter(monkeypatch, wrong: float) -> None:
    weights = normalised([3, 1, 0.5])
    expected = greedy(weights, 2000)
    guess = blend_module.guess_counts

    def guess_wrong(weights, positions):
        counts = guess(weights, positions)
        counts[1:, 0] += wrong
        return counts

    monkeypatch.setattr(blend_module, "guess_counts", guess_wrong)
    assert blend_order(weights, 2000)[0].tolist() == expected[0]


def test_used_up_data_sets_are_passed_over() -> None:
    """With shares that follow the sizes only rounding makes this happen, beyond 10^7 samples."""
    weights, limits = [0.5, 0.3, 0.2], [300, 5, 2000]
    choices = blend_module.walk(np.array(weights), sum(limits), np.array(limits, np.float64))
    assert choices.tolist() == greedy(weights, sum(limits), limits)[0]


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0, 0.0], [math.nan], []])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="blend"):
        blend_order(weights, 5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("corpus/code", [(None, "corpus/code")]),
        ("0.7 a 0.3 b", [(0.7, "a"), (0.3, "b")]),
        ("a b c", [(None, "a"), (None, "b"), (None, "c")]),
        ("a b", [(None, "a"), (None, "b")]),
        (["a b", "c"], [(None, "a b"), (None, "c")]),
        ([30, "a", 70.0, "b"], [(30.0, "a"), (70.0, "b")]),
        (["1", "a"], [(1.0, "a")]),
        (["./2024"], [(None, "./2024")]),
    ],
)
def test_blend_texts(value, expected) -> None:
    assert parse_blend(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "at least one"),
        ([], "at least one"),
        (["a", ""], "at least one"),
        ("0.7 a 0.3", "weight prefix"),
        ("0.7 a b", "weight prefix"),
        ("0.7 a b c", "weight prefix"),
        ("a 0.7", "weight prefix"),
        ("2024", "write ./2024"),
        ("0.5 2024_01 0.5 b", "write ./2024"),
        ("0.5 a -0.5 b", "must be above 0"),
        ("0 a 1 b", "must be above 0"),
        ("nan a 1 b", "must be above 0"),
        ("inf a 1 b", "must be above 0"),
    ],
)
def test_bad_blend_texts_are_refused(value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blend(value)


SEQUENCE_LENGTH, SEED = 8, 77


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    """Three token files; the hundred thousands of an id say which file it is from."""
    folder = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(5)
    prefixes = {}
    for number, name in enumerate("abc"):
        with IndexedDatasetWriter(folder / name, np.int32) as writer:
            for _ in range(40 * (number + 1)):
                start = 100_000 * number + writer.num_tokens
                writer.add_document(np.arange(start, start + rng.integers(1, 60)))
        prefixes[name] = str(folder / name)
    return prefixes


def build(value, num_samples, split=None, which="train"):
    return build_dataset(
        value,
        split=split,
        which=which,
        num_samples=num_samples,
        sequence_length=SEQUENCE_LENGTH,
        seed=SEED,
    )


def plain(prefix: str, num_samples: int | None, ids: range | None = None) -> GPTDataset:
    return GPTDataset(
        IndexedDataset(prefix),
        sequence_ids=ids,
        num_samples=num_samples,
        sequence_length=SEQUENCE_LENGTH,
        seed=SEED,
    )


def assert_same(left, right) -> None:
    assert len(left) == len(right) > 0
    for k in range(len(left)):
        assert left[k].tolist() == right[k].tolist()


def test_one_prefix_has_no_blend_layer(corpora) -> None:
    for num_samples in (None, 1, 500):
        dataset = build(corpora["a"], num_samples)
        assert isinstance(dataset, GPTDataset)
        assert_same(dataset, plain(corpora["a"], num_samples))


def test_weights_and_size(corpora) -> None:
    dataset = build(f"2 {corpora['a']} 3 {corpora['b']} 5 {corpora['c']}", 1001)
    assert isinstance(dataset, BlendedDataset)
    targets = [201, 301, 501]  # ceil of 200.2, 300.3, 500.5
    assert len(dataset) == sum(targets)
    parts = [
        plain(corpora[name], math.ceil(target * 1.005))
        for name, target in zip("abc", targets, strict=True)
    ]
    expected = greedy(normalised(normalised([2, 3, 5])), sum(targets))
    for k, (part, sample) in enumerate(zip(*expected, strict=True)):
        assert dataset[k].tolist() == parts[part][sample].tolist()
        assert dataset[k].min() // 100_000 == part


def test_the_surplus_is_half_a_percent(tmp_path: Path) -> None:
    """A part that has 1,005 samples is enough for 1,000, and is not repeated."""
    for name in "ab":
        with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
            writer.add_document(np.arange(1005 * SEQUENCE_LENGTH + 1))
    dataset = build(f"1 {tmp_path / 'a'} 1 {tmp_path / 'b'}", 2000)
    assert isinstance(dataset, BlendedDataset)
    assert [len(part) for part in dataset.datasets] == [1005, 1005]


def test_no_weights_but_a_size(corpora) -> None:
    value = [corpora["a"], corpora["b"], corpora["c"]]
    parts = [plain(prefix, None) for prefix in value]
    sizes = [len(part) for part in parts]
    for asked in (100, 10**6):
        dataset = build(value, asked)
        assert isinstance(dataset, BlendedDataset)
        size = min(asked, sum(sizes))
        assert len(dataset) == size
        expected = greedy(normalised(sizes), size)
        assert dataset.dataset_index.tolist() == expected[0]
        assert dataset[7].tolist() == parts[expected[0][7]][expected[1][7]].tolist()


def test_neither_weights_nor_size_gives_every_sample_once(corpora) -> None:
    value = [corpora["a"], corpora["c"]]
    dataset = build(value, None)
    parts = [plain(prefix, None) for prefix in value]
    found = sorted(dataset[k].tolist() for k in range(len(dataset)))
    assert found == sorted(part[k].tolist() for part in parts for k in range(len(part)))


def test_one_prefix_with_a_weight_depends_on_the_way_it_is_asked_for(corpora) -> None:
    """As Megatron: --data-path makes a blend of one, --train-data-path ignores the weight."""
    value = f"0.4 {corpora['a']}"
    blended = build(value, 400, split="1")
    assert isinstance(blended, BlendedDataset)
    assert len(blended) == 400
    assert blended.dataset_sample_index.tolist() == list(range(400))
    surplus = plain(corpora["a"], 402)
    assert blended[399].tolist() == surplus[399].tolist()
    assert_same(build(value, 400), plain(corpora["a"], 400))


def test_spare_samples_can_ask_for_one_epoch_more(corpora) -> None:
    """0.5 % more are built than the blend takes, and what is built decides on the order."""
    epoch = len(plain(corpora["c"], None))
    assert epoch > 200  # so that 0.5 % is at least one sample
    largest = max(n for n in range(epoch) if math.ceil(n * 1.005) <= epoch)
    for target, epochs in ((largest, 1), (largest + 1, 2)):
        blended = build(f"1 {corpora['c']}", target, split="1")
        assert isinstance(blended, BlendedDataset)
        assert len(blended) == target < epoch
        assert len(blended.datasets[0].document_index) == 120 * epochs


def test_splits_are_taken_from_every_prefix(corpora) -> None:
    value = [corpora["a"], corpora["b"]]
    dataset = build(value, None, split="50,30,20", which="valid")
    assert isinstance(dataset, BlendedDataset)
    for part, prefix, ids in zip(
        dataset.datasets, value, (range(20, 32), range(40, 64)), strict=True
    ):
        assert_same(part, plain(prefix, None, ids))


def test_requests_that_cannot_be_met(corpora, tmp_path) -> None:
    a, b = corpora["a"], corpora["b"]
    for value in (f"1 {a} 1 {b}", f"1 {a}"):
        with pytest.raises(ValueError, match="number of samples"):
            build(value, None)
    with pytest.raises(ValueError, match="nothing to test"):
        build(a, 5, split="9,1", which="test")
    with pytest.raises(ValueError, match=r"test.*40"):
        build(a, 5, split="969,30,1")
    with pytest.raises(FileNotFoundError, match="token file"):
        build([a, str(tmp_path / "nothing")], 5)
    parts = [plain(a, None), plain(b, None)]
    with pytest.raises(
        ValueError, match=rf"a: the blend wants \d+ samples, it has {len(parts[0])}"
    ):
        BlendedDataset(parts, [9, 1], len(parts[0]) + len(parts[1]))
    with pytest.raises(ValueError, match="number of samples"):
        BlendedDataset(parts, [9, 1], None)
    with pytest.raises(ValueError, match=r"1 blend weight.*2"):
        BlendedDataset(parts, [9], 4)
    dataset = BlendedDataset(parts, None, 4)
    for k in (-1, 4):
        with pytest.raises(IndexError, match="has 4"):
            dataset[k]
