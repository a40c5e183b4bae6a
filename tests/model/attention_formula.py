"""Attention's formula in float64 and two rows of documents, for the tests of every backend."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megaphi.data.documents import Documents, find_documents

ROWS, TIME, HEADS, SIZE, EOD = 2, 24, 3, 16, 9
TOKENS = np.array(
    [
        [1, 2, EOD, 3, 4, 5, 6, EOD, EOD, *range(20, 34), EOD],
        [EOD, *range(40, 55), EOD, *range(60, 67)],
    ]
)
LENGTHS = [[3, 5, 1, 15], [1, 16, 7]]
"""Of the documents in each row of TOKENS, counted by hand."""


def random_projection() -> Tensor:
    """A packed projection [b, t, h, 3, k] as a leaf."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, TIME, HEADS, 3, SIZE, generator=generator).requires_grad_()


def documents_of(tokens: np.ndarray) -> Documents:
    return find_documents(tokens, EOD)


def visible(lengths: list[list[int]] | None) -> Tensor:
    """Bool [b, 1, t, t] from the lengths of the documents, position by position."""
    mask = torch.zeros(ROWS, 1, TIME, TIME, dtype=torch.bool)
    for row in range(ROWS):
        start = 0
        for length in [TIME] if lengths is None else lengths[row]:
            for query in range(start, start + length):
                for key in range(start, query + 1):
                    mask[row, 0, query, key] = True
            start += length
    return mask


def formula(packed: Tensor, mask: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """[b, h, t, k] in float64; `kept` scales the probabilities."""
    query, key, value = packed.double().permute(3, 0, 2, 1, 4)
    scores = torch.einsum("bhqk,bhsk->bhqs", query, key) / SIZE**0.5
    weights = scores.masked_fill(~mask, float("-inf")).exp()
    weights = weights / weights.sum(-1, keepdim=True) * kept
    return torch.einsum("bhqs,bhsk->bhqk", weights, value)


def parts(packed: Tensor) -> tuple[Tensor, ...]:
    """q, k, v as the model hands them over: transposed views of the projection."""
    return tuple(part.transpose(1, 2) for part in packed.unbind(dim=3))


def same(packed: Tensor, result: Tensor, expected: Callable[[Tensor], Tensor]) -> None:
    """Compare result and gradient with those of the formula."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((result * weights).sum(), packed)
    exact_input = packed.detach().double().requires_grad_()
    exact = expected(exact_input)
    (exact_gradient,) = torch.autograd.grad((exact * weights).sum(), exact_input)
    assert result.shape == (ROWS, HEADS, TIME, SIZE)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=4e-6)
