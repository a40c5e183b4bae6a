"""Attention against the formula in float64, forward and backward; what a document sees."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import DropoutSeed, dropout_masks
from megaphi.config import Model
from megaphi.model.attention import AttentionOptions, Sequences, attention
from megaphi.model.execution import Execution
from megaphi.model.init import initialize
from megaphi.model.phi import Phi
from tests.model.attention_formula import (
    HEADS,
    LENGTHS,
    ROWS,
    SIZE,
    TIME,
    TOKENS,
    documents_of,
    formula,
    parts,
    random_projection,
    same,
    visible,
)


@pytest.fixture
def packed() -> Tensor:
    """A packed projection [b, t, h, 3, k] as a leaf."""
    return random_projection()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "documents"])
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_equals_the_formula(packed: Tensor, backend: Any, lengths: Any) -> None:
    documents = None if lengths is None else documents_of(TOKENS)
    result = attention(
        *parts(packed), AttentionOptions(backend=backend), Sequences(documents=documents)
    )
    same(packed, result, lambda exact: formula(exact, visible(lengths)))


def test_short_attention_equals_the_formula(packed: Tensor) -> None:
    result = attention(*parts(packed), AttentionOptions(backend="short"))
    same(packed, result, lambda exact: formula(exact, visible(None)))


@pytest.mark.parametrize("size", [32, 64])
def test_short_attention_in_bf16_is_as_exact_as_pytorchs(size: int) -> None:
    """Up to a factor: its scores are rounded to bf16, for which 0.4% is one unit."""
    torch.manual_seed(0)
    exact = torch.randn(3, 2, 4, 96, size).double()
    weights = torch.randn(2, 4, 96, size)

    def run(dtype: torch.dtype, backend: Any) -> list[Tensor]:
        """The result, and the gradients of queries, keys and values."""
        inputs = [part.to(torch.bfloat16).to(dtype).requires_grad_() for part in exact]
        result = attention(*inputs, AttentionOptions(backend=backend))
        return [result, *torch.autograd.grad((result * weights).sum(), inputs)]

    truth = run(torch.float64, "sdpa")
    errors = {
        backend: [
            float(((got.double() - true).norm() / true.norm()).detach())
            for got, true in zip(run(torch.bfloat16, backend), truth, strict=True)
        ]
        for backend in ("short", "sdpa")
    }
    for ours, theirs in zip(errors["short"], errors["sdpa"], strict=True):
        assert ours <= max(2 * theirs, 0.005)


def test_torch_flash_equals_the_formula(packed: Tensor) -> None:
    result = attention(*parts(packed), AttentionOptions(backend="flash"))
    same(packed, result, lambda exact: formula(exact, visible(None)))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "documents"])
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_exact_dropout_equals_the_formula(packed: Tensor, backend: Any, lengths: Any) -> None:
    """On a CPU both draw their masks from the global position of the query."""
    seed = DropoutSeed(seed=3, step=7, first_token=5 * TIME)
    documents = None if lengths is None else documents_of(TOKENS)
    result = attention(
        *parts(packed),
        AttentionOptions(backend=backend, dropout_probability=0.25, site=4),
        Sequences(dropout=seed, documents=documents),
    )
    shape = torch.Size((ROWS * TIME, HEADS * TIME))
    mask, _ = dropout_masks(shape, 0.25, seed, 4, torch.device("cpu"))
    kept = torch.empty(ROWS, HEADS, TIME, TIME, dtype=torch.float64)
    for row, head in np.ndindex(ROWS, HEADS):
        tokens = slice(row * TIME, (row + 1) * TIME)
        kept[row, head] = mask[tokens, head * TIME : (head + 1) * TIME]
    assert 0.1 < float((kept == 0).double().mean()) < 0.4
    same(packed, result, lambda exact: formula(exact, visible(lengths), kept))


def test_documents_equal_each_document_alone(packed: Tensor) -> None:
    """Also in the gradient: nothing leaks in either direction."""
    weights = torch.randn(ROWS, HEADS, TIME, SIZE)
    together = attention(*parts(packed), sequences=Sequences(documents=documents_of(TOKENS)))
    (gradient,) = torch.autograd.grad((together * weights).sum(), packed)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            place = (slice(row, row + 1), slice(start, start + length))
            alone_input = packed[place].detach().clone().requires_grad_()
            alone = attention(*parts(alone_input))
            torch.testing.assert_close(together[row : row + 1, :, place[1]], alone)
            (own,) = torch.autograd.grad(
                (alone * weights[row : row + 1, :, place[1]]).sum(), alone_input
            )
            torch.testing.assert_close(gradient[place], own, rtol=1e-5, atol=2e-6)
            start += length


def test_the_comparison_sees_a_wrong_mask(packed: Tensor) -> None:
    """An EOD token one document too late, a row's end that is none: each is far off."""
    result = attention(*parts(packed), sequences=Sequences(documents=documents_of(TOKENS)))
    for wrong in ([[2, 5, 1, 16], LENGTHS[1]], [LENGTHS[0], [17, 7]], None):
        assert float((result - formula(packed, visible(wrong))).detach().abs().max()) > 0.1


def test_a_cache_or_padding_takes_the_masked_path(packed: Tensor) -> None:
    """The packages of these backends are not installed here, and nobody asks for them."""
    query, key, value = parts(packed)
    expected = formula(packed, visible(None))[:, :, -5:]
    for backend in ("te", "cudnn", "flash", "sdpa", "plain"):
        last = attention(query[:, :, -5:], key, value, AttentionOptions(backend=backend))
        torch.testing.assert_close(last.double(), expected, rtol=1e-5, atol=2e-6)
    everywhere = torch.ones(ROWS, TIME, dtype=torch.bool)
    padded = attention(
        query,
        key,
        value,
        AttentionOptions(backend="flash2"),
        Sequences(key_mask_bs=everywhere),
    )
    torch.testing.assert_close(padded, attention(query, key, value))


MODEL = Model(num_layers=3, hidden_size=48, num_heads=3, vocab_size=80, max_sequence_length=64)


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_positions_go_on_in_the_next_document(backend: Any) -> None:
    """Each document's logits are those of the document alone, at positions counted from 0."""
    model = Phi(MODEL, Execution(attention=backend))
    initialize(model.named_parameters(), MODEL, seed=2)
    # larger than at the start of training, so that attention is not almost uniform
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight *= 20
            block.out.weight *= 20
    tokens = torch.from_numpy(TOKENS)
    documents = documents_of(TOKENS)
    together = model(tokens, documents=documents)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = model(tokens[row : row + 1, start : start + length])
            found = together[row : row + 1, start : start + length]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
            start += length
    assert float((together - model(tokens)).detach().abs().max()) > 0.1
    loss = model(tokens[:, :-1], tokens[:, 1:], documents=documents_of(TOKENS[:, :-1]))
    expected = F.cross_entropy(
        together[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
