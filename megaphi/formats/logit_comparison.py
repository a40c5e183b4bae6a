"""Logits of two copies of a model compared, one layer in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.formats.weights import ModelWeights
from megaphi.model.phi import Phi


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models are apart."""

    max_difference: float
    """Largest absolute difference of any logit."""
    largest: float
    """Largest absolute logit of the first, to judge the difference by."""
    same_top: float
    """Share of positions at which both name the same most probable token."""
    positions: int
    """Positions compared."""


def fixed_prompt(config: Model) -> list[int]:
    """32 ids spread over the vocabulary, the same for every model of that shape."""
    return [
        (2654435761 * (n + 1)) % config.vocab_size
        for n in range(min(32, config.max_sequence_length))
    ]


@torch.no_grad()
def streamed_logits(weights: ModelWeights, tokens: Sequence[int]) -> Tensor:
    """Logits [t, v] in fp32 on the CPU.

    Memory: one block with the embedding or the head, about 0.7 GB for phi-1, whatever the depth.

    Args:
        weights: the model.
        tokens: ids inside the vocabulary.
    """
    config = weights.config
    stream: tuple[Tensor, ...] = (torch.tensor([tokens]),)
    for index in range(config.num_layers):
        with torch.device("meta"):
            part = Phi(config, layers=range(index, index + 1))
        part = part.to_empty(device="cpu").eval()
        for name, parameter in part.named_parameters():
            parameter.copy_(weights[name])
        batch = part.describe(torch.Size((1, len(tokens))), stream[0].device)
        stream = part.run(stream, batch)
    return stream[0]


def compare_logits(
    first: ModelWeights, second: ModelWeights, tokens: Sequence[int]
) -> LogitComparison:
    """Run both models on `tokens`, one after the other."""
    expected, actual = streamed_logits(first, tokens), streamed_logits(second, tokens)
    if expected.shape != actual.shape:
        return LogitComparison(float("inf"), float(expected.abs().max()), 0.0, len(tokens))
    same = expected.argmax(-1) == actual.argmax(-1)
    # a difference of NaN stays one: it is equal to nothing
    return LogitComparison(
        float((expected - actual).abs().max()),
        float(expected.abs().max()),
        float(same.double().mean()),
        len(tokens),
    )
