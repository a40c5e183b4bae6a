"""The same files and samples as megatron-core itself, where it is installed.

megatron-core takes about 20 s to import and keeps global state, so everything it has to say is
computed by one child process, which is this file run as a program. Install it with
`pip install --no-deps megatron-core==0.16.1` (Python 3.11; it also needs torch and packaging).
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaphi.data.blend import blend_order, build_dataset, exhaustive_order
from megaphi.data.dataset import GPTDataset, build_sample_order, split_ranges
from megaphi.data.indexed import IndexedDataset, IndexedDatasetWriter, optimal_dtype

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
    ),
]

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]
VOCABULARIES = [256, 51_200, 65_499, 65_500, 65_536, 151_936]
EOD = 50_256
SEQUENCE_LENGTH = 16
SPLITS = ("train", "valid", "test")

# One prefix: (split, samples per split, seed). File `a` has about 1,500 samples an epoch.
SINGLE: list[tuple[str, list[int | None], int]] = [
    ("90,8,2", [None, None, None], 1234),
    ("90,8,2", [700, 60, 10], 1),  # parts of one epoch
    ("90,8,2", [1500, 130, 40], 42),  # a little of a second epoch, kept apart
    ("90,8,2", [2600, 230, 50], 7),  # most of a second epoch, mixed in
    ("1", [9001, None, None], 2**32 - 1),  # seven epochs
    ("969, 30, 1", [4000, 400, 5], 0),
    ("0.5,0.5", [1700, 1700, None], 3),
]
# Several prefixes: (--data-path, split or None for --train-data-path and so on, samples, seed).
BLENDS: list[tuple[str, str | None, list[int | None], int]] = [
    ("a b c", "90,8,2", [None, None, None], 1234),
    ("a b c", "90,8,2", [500, 20, 10**6], 5),
    ("0.2 a 0.3 b 0.5 c", "90,8,2", [3000, 100, 7], 1234),
    ("1 a 1 b 1 c", "90,8,2", [1000, 100, 10], 9),
    ("3 c 0.001 a", "1", [2500, 1, 1], 11),
    ("0.4 a", "90,8,2", [2000, 100, 10], 6),  # one prefix with a weight
    ("0.4 a", None, [2000, 100, 10], 6),
    ("0.2 a 0.3 b 0.5 c", None, [2222, 50, 3], 8),
    ("b a", None, [None, 77, 10**6], 8),
    ("b", None, [5000, None, 3], 8),
]
WEIGHTS = [[1.0], [0.7, 0.3], [1, 1, 1], [0.5, 0.4999, 1e-4], [3, 1e-6, 2, 2, 1e-3], [1.0] * 10]
SIZES = [[7], [2, 5, 1], [1, 900, 30], [400] * 5, [1, 1, 2000, 1], [3, 700, 90, 90, 11]]
FLOAT32_TOKENS, FLOAT32_SEQUENCE = 50_331_650, 2048


def documents_of(dtype: str, seed: int) -> list[tuple[list[int], list[int]]]:
    """Random documents (tokens, sequence lengths) with empty ones and empty sequences."""
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    documents = []
    for _ in range(30):
        lengths = rng.integers(0, 6, rng.integers(0, 4)).tolist()
        tokens = rng.integers(limits.min, limits.max, sum(lengths), dtype, endpoint=True)
        documents.append((tokens.tolist(), lengths))
    return documents


def normalised(weights: list[float]) -> np.ndarray:
    return np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))


# ---------------------------------------------------------------- what megatron-core says


def megatron_files(folder: Path, results: dict[str, Any]) -> None:
    """Write with megatron-core's builder, read ours with its reader."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronIndexedDataset

    for dtype in DTYPES:
        for seed in (0, 1):
            prefix = folder / "theirs" / f"{dtype}-{seed}"
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
            for tokens, lengths in documents_of(dtype, seed):
                builder.add_document(tokens, lengths)
            builder.finalize(f"{prefix}.idx")
        merged = folder / "theirs" / f"{dtype}-merged"
        builder = IndexedDatasetBuilder(f"{merged}.bin", dtype=np.dtype(dtype).type)
        for seed in (0, 1):
            builder.add_index(str(folder / "theirs" / f"{dtype}-{seed}"))
        builder.finalize(f"{merged}.idx")
        ours = MegatronIndexedDataset(str(folder / "ours" / f"{dtype}-0"))
        results[f"{dtype}.tokens"] = np.concatenate([ours[i] for i in range(len(ours))])
        # Copies: its arrays are views of a file that it unmaps when it is collected.
        results[f"{dtype}.lengths"] = ours.sequence_lengths.copy()
        results[f"{dtype}.documents"] = ours.document_indices.copy()
    results["optimal"] = [
        np.dtype(DType.optimal_dtype(vocab_size)).name for vocab_size in VOCABULARIES
    ]


def megatron_samples(folder: Path, key: str, results: dict[str, Any], **config: Any) -> None:
    """Build train, valid and test with megatron-core and keep every sample of each."""
    from types import SimpleNamespace

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronGPTDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    sizes = config.pop("sizes")
    tokenizer = SimpleNamespace(
        vocab_size=51_200, eod=EOD, pad=EOD, unique_identifiers={"name": "test"}
    )
    resolved = GPTDatasetConfig(
        sequence_length=SEQUENCE_LENGTH,
        path_to_cache=str(folder / "cache" / key),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **config,
    )
    built = BlendedMegatronDatasetBuilder(MegatronGPTDataset, sizes, lambda: True, resolved).build()
    for name, dataset in zip(SPLITS, built, strict=True):
        if dataset is not None:
            rows = [dataset[k] for k in range(len(dataset))]
            results[f"{key}.{name}"] = np.array(
                [np.append(row["tokens"].numpy(), row["labels"].numpy()[-1]) for row in rows]
            )


def ask_megatron(folder: Path) -> None:
    """The child process: write everything that megatron-core says to `results.npz`."""
    import torch
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import get_blend_from_list

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    results: dict[str, Any] = {}
    megatron_files(folder, results)

    def data_path(blend: str) -> Any:
        words = [str(folder / word) if word in "abc" else word for word in blend.split()]
        return get_blend_from_list(words)

    for number, (split, sizes, seed) in enumerate(SINGLE):
        config = {"blend": data_path("a"), "split": split, "random_seed": seed}
        megatron_samples(folder, f"single{number}", results, sizes=sizes, **config)
    for number, (blend, whole_or_split, sizes, seed) in enumerate(BLENDS):
        config = {"blend": data_path(blend), "split": whole_or_split, "random_seed": seed}
        if whole_or_split is None:
            config = {"blend_per_split": [data_path(blend)] * 3, "random_seed": seed}
        megatron_samples(folder, f"blend{number}", results, sizes=sizes, **config)
    config = {"blend": data_path("a"), "split": "50,50", "random_seed": 21}
    config["drop_last_partial_validation_sequence"] = False
    megatron_samples(folder, "partial", results, sizes=[None, None, None], **config)

    for number, weights in enumerate(WEIGHTS):
        index, sample = np.zeros(20_000, np.int16), np.zeros(20_000, np.int64)
        shares = normalised(weights)
        helpers.build_blending_indices(index, sample, shares, len(shares), len(index), False)
        results[f"weights{number}"] = np.stack([index, sample])
    for number, lengths in enumerate(SIZES):
        total = sum(lengths)
        index, sample = np.zeros(total, np.int16), np.zeros(total, np.int64)
        helpers.build_exhaustive_blending_indices(index, sample, np.array(lengths), len(lengths))
        results[f"sizes{number}"] = np.stack([index, sample])
    one = np.array([FLOAT32_TOKENS], np.int32)
    results["float32"] = helpers.build_sample_idx(
        one, np.zeros(1, np.int32), FLOAT32_SEQUENCE, 1, FLOAT32_TOKENS, False, True
    )
    torch.distributed.destroy_process_group()
    np.savez(folder / "results.npz", **results)


# ---------------------------------------------------------------- and what megaphi says


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files, then the child's answer beside them."""
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "theirs").mkdir()
    for dtype in DTYPES:
        for seed in (0, 1):
            with IndexedDatasetWriter(folder / "ours" / f"{dtype}-{seed}", dtype) as writer:
                for tokens, lengths in documents_of(dtype, seed):
                    writer.add_document(tokens, lengths)
        with IndexedDatasetWriter(folder / "ours" / f"{dtype}-merged", dtype) as writer:
            for seed in (0, 1):
                writer.add_index(folder / "ours" / f"{dtype}-{seed}")
    rng = np.random.default_rng(12)
    for name, num_documents in (("a", 1200), ("b", 700), ("c", 250)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(num_documents):
                writer.add_document(rng.integers(0, EOD, rng.integers(0, 40)))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    child = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Any]:
    with np.load(folder / "results.npz") as results:
        yield results


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_byte_identical(folder: Path, dtype: str) -> None:
    for name in (f"{dtype}-0", f"{dtype}-1", f"{dtype}-merged"):
        for suffix in ("bin", "idx"):
            theirs = (folder / "theirs" / f"{name}.{suffix}").read_bytes()
            assert len(theirs) > 34
            assert (folder / "ours" / f"{name}.{suffix}").read_bytes() == theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_reads_what_the_other_wrote(folder: Path, reference: Any, dtype: str) -> None:
    documents = documents_of(dtype, 0)
    tokens = [token for ids, _ in documents for token in ids]
    lengths = [length for _, sizes in documents for length in sizes]
    assert reference[f"{dtype}.tokens"].tolist() == tokens
    assert reference[f"{dtype}.lengths"].tolist() == lengths
    theirs = IndexedDataset(folder / "theirs" / f"{dtype}-0")
    assert np.concatenate(list(theirs)).tolist() == tokens
    assert theirs.lengths.tolist() == lengths
    assert reference[f"{dtype}.documents"].tolist() == theirs.document_index.tolist()


def test_dtype_by_vocabulary(reference: Any) -> None:
    ours = [optimal_dtype(vocab_size).name for vocab_size in VOCABULARIES]
    assert ours == reference["optimal"].tolist()


def assert_splits_equal(
    folder: Path, reference: Any, key: str, blend: str, split: str | None, sizes: Any, seed: int
) -> None:
    words = [str(folder / word) if word in "abc" else word for word in blend.split()]
    compared = 0
    for which, num_samples in zip(SPLITS, sizes, strict=True):
        if f"{key}.{which}" not in reference:
            continue
        ours = build_dataset(
            words,
            split=split,
            which=which,
            num_samples=num_samples,
            sequence_length=SEQUENCE_LENGTH,
            seed=seed,
        )
        theirs = reference[f"{key}.{which}"]
        assert len(ours) == len(theirs) > 0
        np.testing.assert_array_equal(np.stack([ours[k] for k in range(len(ours))]), theirs)
        compared += 1
    assert compared == (3 if split is None else sum(map(bool, split_ranges(split, 10**6))))


@pytest.mark.parametrize("number", range(len(SINGLE)))
def test_samples_of_one_file(folder: Path, reference: Any, number: int) -> None:
    split, sizes, seed = SINGLE[number]
    assert_splits_equal(folder, reference, f"single{number}", "a", split, sizes, seed)


@pytest.mark.parametrize("number", range(len(BLENDS)))
def test_samples_of_blends(folder: Path, reference: Any, number: int) -> None:
    blend, split, sizes, seed = BLENDS[number]
    assert_splits_equal(folder, reference, f"blend{number}", blend, split, sizes, seed)


def test_a_short_last_sample(folder: Path, reference: Any) -> None:
    indexed = IndexedDataset(folder / "a")
    bounds = split_ranges("50,50", len(indexed))[1]
    assert bounds is not None
    assert (int(indexed.lengths[slice(*bounds)].sum()) - 1) % SEQUENCE_LENGTH > 0
    ours = GPTDataset(
        indexed,
        sequence_ids=range(*bounds),
        num_samples=None,
        sequence_length=SEQUENCE_LENGTH,
        seed=21,
        drop_last=False,
        pad_id=0,  # Megatron pads with -1 and then puts 0 in its place
    )
    samples = np.stack([ours[k] for k in range(len(ours))])
    np.testing.assert_array_equal(samples, reference["partial.valid"])


@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_blend_orders(reference: Any, number: int) -> None:
    order = blend_order(normalised(WEIGHTS[number]), 20_000)
    np.testing.assert_array_equal(np.stack(order), reference[f"weights{number}"])


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_exhaustive_orders(reference: Any, number: int) -> None:
    np.testing.assert_array_equal(
        np.stack(exhaustive_order(SIZES[number])), reference[f"sizes{number}"]
    )


def test_the_one_known_difference(reference: Any) -> None:
    """Megatron counts short last windows in float32 and can lose one; ours is exact."""
    theirs = reference["float32"]
    ours = build_sample_order(
        np.array([FLOAT32_TOKENS], np.int32),
        range(1),
        None,
        FLOAT32_SEQUENCE,
        0,
        drop_last=False,
    ).sample_index
    assert (len(theirs), len(ours)) == (24_577, 24_578)
    np.testing.assert_array_equal(ours[: len(theirs)], theirs)


if __name__ == "__main__":
    ask_megatron(Path(sys.argv[1]))
