"""Megatron-Core's side of `megaphi bench data`: its own code on the same inputs.

Left out, since megaphi has nothing of the kind, are the three .npy files that Megatron writes,
reads back and maps for every data set.

Called as `python -m tools.bench.data.megatron_peer REQUEST.json`, like `measures.py`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tools.bench.data.measures import (
    BLEND_WEIGHTS,
    SEED,
    SEQUENCE_LENGTH,
    Measure,
    Request,
    compared_samples,
    digest_arrays,
    made_up_lengths,
    run_request,
)


def index_megatron(request: Request) -> Measure:
    """The body of GPTDataset's index builder: document, sample and shuffle index."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    lengths = made_up_lengths(request["index_tokens"])
    ids = np.arange(len(lengths), dtype=np.int32)

    def work() -> tuple[Any, ...]:
        num_tokens = int(np.sum(lengths[ids]))
        random = np.random.RandomState(SEED)
        document_index = _build_document_index(ids, 1, random, False)
        sample_index = helpers.build_sample_idx(
            lengths, document_index, SEQUENCE_LENGTH, 1, num_tokens, True, True
        )
        num_samples = len(sample_index) - 1
        shuffle_index = _build_shuffle_index(num_samples, num_samples, random)
        return document_index, sample_index, shuffle_index

    return Measure(int(lengths.sum(dtype=np.int64)), work, digest_arrays, warm_up=True)


def blend_megatron(request: Request) -> Measure:
    """BlendedDataset's C++ helper."""
    from megatron.core.datasets import helpers

    size, weights = request["blend_samples"], np.array(BLEND_WEIGHTS, np.float64)

    def work() -> tuple[Any, ...]:
        dataset_index = np.zeros(size, np.int16)
        sample_index = np.zeros(size, np.int64)
        helpers.build_blending_indices(
            dataset_index, sample_index, weights, len(weights), size, False
        )
        return dataset_index, sample_index

    return Measure(size, work, digest_arrays, warm_up=True)


def loader_megatron(request: Request) -> Measure:
    """GPTDataset.__getitem__ for the same samples, one after another, not collated."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix, count = request["prefix"], request["loader_samples"]
    config = GPTDatasetConfig(
        sequence_length=SEQUENCE_LENGTH,
        random_seed=SEED,
        blend=([prefix], None),
        split="1",
        path_to_cache=f"{prefix}.megatron-cache",
        # the ids are never looked at: padding and end-of-document masks are off
        tokenizer=SimpleNamespace(eod=0, pad=0, vocab_size=1, unique_identifiers={"name": "bench"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix)
    ids = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, ids, count, Split.train, config)
    rows = compared_samples(count)

    def work() -> None:
        for k in range(count):
            dataset[k]

    def digest(_: None) -> str:
        samples = [dataset[k] for k in range(rows)]
        return digest_arrays(
            np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1]) for sample in samples
        )

    return Measure(count, work, digest, warm_up=True)


MEASURES: dict[str, Callable[[Request], Measure]] = {
    measure.__name__: measure for measure in (index_megatron, blend_megatron, loader_megatron)
}

if __name__ == "__main__":
    run_request(MEASURES, Path(sys.argv[1]))
