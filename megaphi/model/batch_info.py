"""What the blocks need to know of a batch in addition to its values."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.data.documents import Documents
from megaphi.model.cache import BlockCache
from megaphi.model.rotary import rotary_tables
from megaphi.parallel.context import ContextAxis


@dataclass(frozen=True)
class BatchInfo:
    """One batch of sequences on this process."""

    size: int
    """Sequences."""
    time: int
    """Tokens of a sequence on this process."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the tokens' positions, [t, r] or [b, t, r] for rotary dimensions 2 r."""
    dropout: DropoutSeed | None = None
    """Position in the run's random numbers; None means no dropout."""
    documents: Documents | None = None
    """Documents that a token may not see out of."""
    caches: Sequence[BlockCache] | None = None
    """Keys and values so far, one cache for each block; None except in generation."""
    last_only: bool = False
    """Whether the head reads the last token of each sequence only."""


def batch_info(
    config: Model,
    axis: ContextAxis,
    shape: torch.Size,
    device: torch.device,
    dropout: DropoutSeed | None = None,
    positions: Tensor | None = None,
) -> BatchInfo:
    """Describe a batch of whole sequences, of which this process computes its part.

    Args:
        config: the model.
        axis: the context axis.
        shape: sequences and their tokens, over all processes of the context axis.
        device: where the batch is.
        dropout: position in the run's random numbers.
        positions: int64 [t] or [b, t] positions of the tokens; 0 … t-1 when not given.
    """
    size, time = shape[0], shape[1] // axis.size
    cosine, sine = rotary_tables(
        config.max_sequence_length, config.rotary_dim, config.rotary_base, device
    )
    if axis.size > 1:
        assert positions is None, "positions are those of the context axis"
        positions = axis.positions(time, device)
        if dropout is not None:
            first_of_row = torch.arange(size, device=device)[:, None] * shape[1]
            tokens_n = (first_of_row + positions).flatten()
            dropout = dataclasses.replace(dropout, tokens_n=tokens_n)
    if positions is None:
        rotary = (cosine[:time], sine[:time])
    else:
        rotary = (cosine[positions], sine[positions])
    return BatchInfo(size, time, rotary, dropout)
