"""Tables of the rotary position embedding (Su et al., arXiv 2104.09864)."""

import functools

import torch
from torch import Tensor


def rotary_tables(
    num_positions: int, rotary_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x frequency.

    Frequency i of rotary_dim / 2 is base^(-2 i / rotary_dim).

    Args:
        num_positions: rows of the tables.
        rotary_dim: elements of a head that are turned; even.
        base: 10,000 in phi-1.
        device: where the tables live.

    Returns:
        Two fp32 tensors [num_positions, rotary_dim / 2], shared between callers: do not write.
    """
    # torch.compile cannot see through the cache, and says so; it computes the tables in its graph
    make = _make_tables if torch.compiler.is_compiling() else _kept_tables
    return make(num_positions, rotary_dim, base, device)


def _make_tables(
    num_positions: int, rotary_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tables, made anew."""
    # On the CPU first, so that every device turns by the same angles. The exponents are formed as
    # Hugging Face's Phi forms them: the two must agree on long sequences.
    # Inference mode is left because a table made in it could not be used for training later.
    with torch.inference_mode(False):
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        frequencies = 1.0 / (base**exponents)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        return angles.cos().to(device), angles.sin().to(device)


_kept_tables = functools.lru_cache(maxsize=8)(_make_tables)
