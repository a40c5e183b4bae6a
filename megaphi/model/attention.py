"""Causal self-attention behind one function, whatever kernel computes it.

Which backend a run takes is decided once, by `megaphi.model.attention_backends`; the kernels
that work on whole sequences are called by `megaphi.model.attention_kernels`.

Suffixes: b batch, h heads, q query positions, s key positions, t positions where both are the same,
k elements of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ops import DropoutSeed, dropout_masks
from megaphi.data.documents import Documents
from megaphi.model.attention_backends import Backend
from megaphi.model.attention_kernels import ALIGNED_TO_END, KERNELS


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is the same in every call for a block."""

    backend: Backend = "sdpa"
    """What computes it."""
    dropout_probability: float = 0.0
    """Share of attention probabilities to drop."""
    site: int = 0
    """Number of this dropout among those of the model."""
    first_head: int = 0
    """Number of the first head that is given, among the heads of all processes."""
    num_heads: int | None = None
    """Heads of all processes; those that are given, where it is None."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What is known of the sequences in one call."""

    dropout: DropoutSeed | None = None
    """Position in the run's random numbers; None means no dropout."""
    documents: Documents | None = None
    """The documents that a token may not see out of; they need as many queries as keys."""
    key_mask_bs: Tensor | None = None
    """Bool, False where a key is padding that nobody may see; None without padding."""
    length: int | None = None
    """Tokens of a sequence; the number of keys, where it is None. Under context parallelism later
    keys are not given."""


_DEFAULTS = AttentionOptions()
_WHOLE_SEQUENCES = Sequences()


def attention(
    query_bhqk: Tensor,
    key_bhsk: Tensor,
    value_bhsk: Tensor,
    options: AttentionOptions = _DEFAULTS,
    sequences: Sequences = _WHOLE_SEQUENCES,
) -> Tensor:
    """softmax(Q K^T / sqrt(k)) V, each query seeing the keys up to its own position.

    The last query stands at the last key: with fewer queries than keys (decoding from a cache) the
    mask is aligned to the end, as flash-attn's is. The other kernels align it to the start, and
    none takes padding: PyTorch's, with an explicit mask, stands in for them there.

    The plain backend draws its dropout masks from the global position, so that the loss does not
    depend on the layout; a CPU always does so. The kernels of a GPU draw from the device's
    generator (the trainer seeds it for every micro-batch, so that resuming is exact, but another
    layout draws other masks).

    Args:
        query_bhqk: queries.
        key_bhsk: keys, s >= q.
        value_bhsk: values.
        options: what is the same in every call.
        sequences: what is known of the sequences in this call.

    Returns:
        [b, h, q, k] in the dtype of the queries.
    """
    num_queries, num_keys = query_bhqk.shape[2], key_bhsk.shape[2]
    documents, key_mask_bs = sequences.documents, sequences.key_mask_bs
    probability = options.dropout_probability if sequences.dropout is not None else 0.0
    square = key_mask_bs is None and num_queries == num_keys
    assert square or documents is None, "documents need whole sequences and no padding"
    aligned_to_end = key_mask_bs is None and options.backend in ALIGNED_TO_END
    if (square and options.backend in KERNELS) or aligned_to_end:
        views = (tensor.transpose(1, 2) for tensor in (query_bhqk, key_bhsk, value_bhsk))
        attended_bthk: Tensor = KERNELS[options.backend](*views, probability, documents)
        return attended_bthk.transpose(1, 2)
    plain = options.backend == "plain" or (probability > 0 and query_bhqk.device.type == "cpu")
    if square and documents is None and not plain:
        return F.scaled_dot_product_attention(
            query_bhqk, key_bhsk, value_bhsk, dropout_p=probability, is_causal=True
        )
    visible_bhqs = visible_keys(num_queries, num_keys, query_bhqk.device, key_mask_bs, documents)
    if not plain:
        return F.scaled_dot_product_attention(
            query_bhqk, key_bhsk, value_bhsk, attn_mask=visible_bhqs, dropout_p=probability
        )
    # the q x s intermediates of all layers together would not fit in memory: backward makes them
    # again
    attended_bhqk: Tensor = checkpoint(
        _plain_attention,
        query_bhqk,
        key_bhsk,
        value_bhsk,
        visible_bhqs,
        options,
        sequences,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return attended_bhqk


def attention_of_one(
    query_bh1k: Tensor, key_bhsk: Tensor, value_bhsk: Tensor, key_mask_bs: Tensor | None
) -> Tensor:
    """softmax(Q K^T / sqrt(k)) V of one query in each row: a step of decoding from a cache.

    No mask is made here: the query sees every key that `key_mask_bs` (bool, None: all) lets it see,
    at least one. The shapes are all that a CUDA graph would record.

    Returns:
        [b, h, 1, k] in the dtype of the query.
    """
    mask_b11s = None if key_mask_bs is None else key_mask_bs[:, None, None]
    return F.scaled_dot_product_attention(query_bh1k, key_bhsk, value_bhsk, attn_mask=mask_b11s)


def visible_keys(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    key_mask_bs: Tensor | None,
    documents: Documents | None,
) -> Tensor:
    """Bool [b or 1, 1, q, s], True where a query may look; every query may look somewhere."""
    visible_bhqs = causal_mask(num_queries, num_keys, device)[None, None]
    if documents is not None:
        ids_bt = documents.ids_bt
        visible_bhqs = visible_bhqs & (ids_bt[:, None, :, None] == ids_bt[:, None, None, :])
    if key_mask_bs is not None:
        visible_bhqs = visible_bhqs & key_mask_bs[:, None, None, :]
        # a padding query sees nothing; let it see the first key so that it stays finite
        blind = ~visible_bhqs.any(dim=-1, keepdim=True)
        visible_bhqs = visible_bhqs | (blind & (torch.arange(num_keys, device=device) == 0))
    return visible_bhqs


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Bool [queries, keys], True where a query may look, the last query at the last key."""
    positions = torch.arange(num_keys, device=device)
    return positions[None, :] <= positions[num_keys - num_queries :, None]


def _plain_attention(
    query_bhqk: Tensor,
    key_bhsk: Tensor,
    value_bhsk: Tensor,
    visible_bhqs: Tensor,
    options: AttentionOptions,
    sequences: Sequences,
) -> Tensor:
    """Attention by its formula in fp32, with masks drawn from the global position."""
    scores_bhqs = query_bhqk.float() @ key_bhsk.float().transpose(-1, -2)
    scores_bhqs = scores_bhqs / math.sqrt(query_bhqk.shape[-1])
    weights_bhqs = scores_bhqs.masked_fill(~visible_bhqs, float("-inf")).softmax(dim=-1)
    dropout, probability = sequences.dropout, options.dropout_probability
    if dropout is not None and probability > 0:
        batch, heads, num_queries, num_keys = scores_bhqs.shape
        num_heads, length = options.num_heads or heads, sequences.length or num_keys
        rows = torch.Size((batch * num_queries, num_heads * length))
        mask, _ = dropout_masks(rows, probability, dropout, options.site, query_bhqk.device)
        mask_bqhs = mask.view(batch, num_queries, num_heads, length)
        mask_bqhs = mask_bqhs[:, :, options.first_head : options.first_head + heads, :num_keys]
        weights_bhqs = weights_bhqs * mask_bqhs.transpose(1, 2)
    return (weights_bhqs @ value_bhsk.float()).to(query_bhqk.dtype)
