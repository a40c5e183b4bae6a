"""Where documents begin: against Megatron's loop and by hand; and on their way to the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphi.config import Recipe
from megaphi.data.documents import find_documents
from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.data.loader import (
    Loader,
    LoaderOptions,
    to_micro_batch,
)
from megaphi.data.samples import check_token_files, end_of_document
from megaphi.data.sidecar import TokenFileInfo, write_info, written_facts
from megaphi.model.attention import visible_keys
from megaphi.recipe_file import load_recipe
from tests.helpers import toy_options

EOD = 0
CPU = torch.device("cpu")


def megatron_mask(tokens: np.ndarray) -> torch.Tensor:
    """What Megatron's `--reset-attention-mask` makes of a row: after each EOD, nothing before."""
    rows, time = tokens.shape
    mask = torch.ones(rows, 1, time, time).tril()
    for row in range(rows):
        for index in np.flatnonzero(tokens[row] == EOD):
            mask[row, 0, index + 1 :, : index + 1] = 0
    return mask.bool()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4),
    time=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_documents_of_random_rows(rows: int, time: int, share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 9, (rows, time))
    tokens[generator.random((rows, time)) < share] = EOD
    documents = find_documents(tokens, EOD)

    assert torch.equal(visible_keys(time, time, CPU, None, documents), megatron_mask(tokens))
    # the bounds say the same as the numbers
    starts = documents.starts
    assert (starts.dtype, documents.ids_bt.dtype) == (torch.int32, torch.int32)
    lengths = starts.diff()
    assert int(lengths.min()) >= 0
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths.long())
    assert torch.equal(numbers, documents.ids_bt.flatten().long())
    # few different shapes and lengths
    count = len(starts) - 1
    filled = int((lengths > 0).sum())
    assert filled <= count < 2 * filled
    assert count & (count - 1) == 0
    assert bool((starts[filled:] == rows * time).all())
    longest = int(lengths.max())
    assert longest <= documents.longest < longest + 128
    assert documents.longest == time or documents.longest % 128 == 0
    assert documents.longest <= time


def test_documents_by_hand() -> None:
    """The EOD token belongs to the document that it ends; a row starts a document."""
    documents = find_documents(np.array([[5, EOD, 6, 7], [EOD, EOD, 8, EOD]]), EOD)
    assert documents.starts.tolist() == [0, 2, 4, 5, 6, 8, 8, 8, 8]
    assert documents.ids_bt.tolist() == [[0, 0, 1, 1], [2, 3, 4, 4]]
    assert documents.longest == 4
    long = np.ones((1, 1000), np.int64)
    long[0, 129] = EOD
    assert find_documents(long[:, :130], EOD).longest == 130
    assert find_documents(long, EOD).longest == 896


class Counting:
    """Sample i counts up from i; every fourth token ends a document."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> np.ndarray:
        return np.arange(index, index + 17, dtype=np.int64) % 4


def test_micro_batches_bring_the_documents_of_their_inputs() -> None:
    samples = np.array([[1, 2, EOD, 3, EOD]])
    batch = to_micro_batch(samples, 3, CPU, EOD)
    assert batch.documents is not None
    # the last token is a label only
    assert batch.documents.ids_bt.tolist() == [[0, 0, 0, 1]]
    assert (batch.tokens_bt.tolist(), batch.labels_bt.tolist()) == ([[1, 2, 0, 3]], [[2, 0, 3, 0]])
    assert to_micro_batch(samples, 3, CPU).documents is None


@pytest.mark.parametrize("eod_id", [None, EOD])
def test_loader(eod_id: int | None) -> None:
    loader = Loader(
        lambda number: Counting(),
        LoaderOptions(
            planned_samples=20,
            micro_batch_size=2,
            vocab_size=50,
            device=CPU,
            prefetch=2,
            eod_id=eod_id,
        ),
        part=(1, 2),
        consumed_samples=4,
    )
    try:
        for first in (6, 10):
            batch = next(loader)
            assert batch.first_sample == first
            if eod_id is None:
                assert batch.documents is None
                continue
            expected = find_documents(batch.tokens_bt.numpy(), eod_id)
            assert batch.documents is not None
            assert torch.equal(batch.documents.starts, expected.starts)
            assert torch.equal(batch.documents.ids_bt, expected.ids_bt)
            assert int(batch.documents.ids_bt.max()) >= 8
    finally:
        loader.close()


def token_file(prefix: Path, eod_id: int | None) -> Path:
    """A token file, described unless `eod_id` is None."""
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_document(list(range(300)))
    if eod_id is not None:
        info = TokenFileInfo(
            tokenizer="t",
            tokenizer_sha256="ab" * 32,
            vocab_size=400,
            eod_id=eod_id,
            recipe={},
            **written_facts(writer),
        )
        write_info(prefix, info)
    return prefix


def recipe_of(train: Path, validation: Path, mask: bool = True) -> Recipe:
    options = [o for o in toy_options(train, train.parent / "run") if "split" not in o]
    masked = f"--data.mask_documents={str(mask).lower()}"
    return load_recipe([*options, f"--data.validation={validation}", masked])


def test_the_end_of_a_document_comes_from_the_token_files(tmp_path: Path) -> None:
    train, same = token_file(tmp_path / "train", 7), token_file(tmp_path / "same", 7)
    recipe = recipe_of(train, same)
    assert end_of_document(recipe, check_token_files(recipe)) == 7

    other = token_file(tmp_path / "other", 8)
    recipe = recipe_of(train, other)
    with pytest.raises(ValueError, match=r"8 .*other.* 7 .*train"):
        end_of_document(recipe, check_token_files(recipe))

    bare = token_file(tmp_path / "bare", None)
    recipe = recipe_of(train, bare)
    with pytest.raises(ValueError, match=r"data\.mask_documents: .*bare\.json"):
        end_of_document(recipe, check_token_files(recipe))
    recipe = recipe_of(train, bare, mask=False)
    assert end_of_document(recipe, check_token_files(recipe)) is None
