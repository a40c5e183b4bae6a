"""Causal self-attention behind one function.

Suffixes: b batch, h heads, q query positions, s key positions, k elements of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ops import DropoutSeed, dropout_masks


def attention(
    query_bhqk: Tensor,
    key_bhsk: Tensor,
    value_bhsk: Tensor,
    *,
    dropout_probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
    key_mask_bs: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(k)) V, each query seeing the keys up to its own position.

    The last query stands at the last key: with fewer queries than keys (decoding from a cache) the
    mask is aligned to the end. Without a mask or dropout PyTorch's fused attention runs. With
    dropout, CPU runs the plain formula with masks drawn from the global position, so that the
    loss does not depend on the layout; a GPU runs the fused kernels, whose masks come from the
    device's generator (the trainer seeds it for every micro-batch, so that resuming is exact, but
    another layout draws other masks).

    Args:
        query_bhqk: queries.
        key_bhsk: keys, s >= q.
        value_bhsk: values.
        dropout_probability: share of attention probabilities to drop.
        dropout: place in the run's random numbers; None means no dropout.
        site: which dropout of the model this is.
        key_mask_bs: bool, False where a key is padding that nobody may see.

    Returns:
        [b, h, q, k] in the dtype of the queries.
    """
    num_queries, num_keys = query_bhqk.shape[2], key_bhsk.shape[2]
    probability = dropout_probability if dropout is not None else 0.0
    if (
        key_mask_bs is None
        and num_queries == num_keys
        and not (probability > 0 and query_bhqk.device.type == "cpu")
    ):
        return F.scaled_dot_product_attention(
            query_bhqk, key_bhsk, value_bhsk, dropout_p=probability, is_causal=True
        )
    visible_bhqs = causal_mask(num_queries, num_keys, query_bhqk.device)[None, None]
    if key_mask_bs is not None:
        visible_bhqs = visible_bhqs & key_mask_bs[:, None, None, :]
        # a padding query sees nothing; let it see the first key so that it stays finite
        blind = ~visible_bhqs.any(dim=-1, keepdim=True)
        visible_bhqs = visible_bhqs | (blind & (torch.arange(num_keys, device=blind.device) == 0))
    if probability == 0.0:
        return F.scaled_dot_product_attention(
            query_bhqk, key_bhsk, value_bhsk, attn_mask=visible_bhqs
        )
    # the q x s intermediates of all layers together would not fit in memory: backward makes them
    # again
    attended_bhqk: Tensor = checkpoint(
        _plain_attention,
        query_bhqk,
        key_bhsk,
        value_bhsk,
        visible_bhqs,
        probability,
        dropout,
        site,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return attended_bhqk


def _plain_attention(
    query_bhqk: Tensor,
    key_bhsk: Tensor,
    value_bhsk: Tensor,
    visible_bhqs: Tensor,
    probability: float,
    dropout: DropoutSeed,
    site: int,
) -> Tensor:
    """Attention by its formula in fp32, with masks drawn from the global position."""
    scores_bhqs = query_bhqk.float() @ key_bhsk.float().transpose(-1, -2)
    scores_bhqs = scores_bhqs / math.sqrt(query_bhqk.shape[-1])
    weights_bhqs = scores_bhqs.masked_fill(~visible_bhqs, float("-inf")).softmax(dim=-1)
    batch, heads, num_queries, num_keys = scores_bhqs.shape
    rows = torch.Size((batch * num_queries, heads * num_keys))
    mask, _ = dropout_masks(rows, probability, dropout, site, query_bhqk.device)
    mask_bhqs = mask.view(batch, num_queries, heads, num_keys).transpose(1, 2)
    return ((weights_bhqs * mask_bhqs) @ value_bhsk.float()).to(query_bhqk.dtype)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Bool [queries, keys], True where a query may look, the last query at the last key."""
    positions = torch.arange(num_keys, device=device)
    return positions[None, :] <= positions[num_keys - num_queries :, None]
