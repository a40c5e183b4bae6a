"""Causal self-attention behind one function, whatever kernel computes it.

Which backend a run takes is decided once, by `megaphi.model.attention_backends`. Each adapter here
follows the documentation of its package: flash-attn 2 (`flash_attn`), 3 (`flash_attn_interface`,
from the folder `hopper` of its repository) and 4 (`flash_attn.cute`), Transformer Engine's
`DotProductAttention`, and PyTorch's `scaled_dot_product_attention` and `varlen_attn`. None copies
its inputs: q, k and v are strided views of the packed projection, and every kernel takes strides.

Suffixes: b batch, h heads, q query positions, s key positions, t positions where both are the same,
n positions of all rows one after another, k elements of a head.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.utils.checkpoint import checkpoint

from kernels.ops import DropoutSeed, dropout_masks
from megaphi.data.documents import Documents
from megaphi.model.attention_backends import Backend


@dataclass(frozen=True)
class HeadPart:
    """Which part of an attention is computed, for the plain backend's dropout masks."""

    first_head: int
    """Number of the first head that is given."""
    num_heads: int
    """Heads of all processes."""
    num_keys: int
    """Tokens of a sequence, of which later ones may not be given."""


def attention(
    query_bhqk: Tensor,
    key_bhsk: Tensor,
    value_bhsk: Tensor,
    *,
    backend: Backend = "sdpa",
    dropout_probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
    part: HeadPart | None = None,
    key_mask_bs: Tensor | None = None,
    documents: Documents | None = None,
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
        backend: what computes it.
        dropout_probability: share of attention probabilities to drop.
        dropout: place in the run's random numbers; None means no dropout.
        site: which dropout of the model this is.
        part: which part this is of what all processes compute; everything when not given.
        key_mask_bs: bool, False where a key is padding that nobody may see.
        documents: the documents that a token may not see out of; needs q = s.

    Returns:
        [b, h, q, k] in the dtype of the queries.
    """
    num_queries, num_keys = query_bhqk.shape[2], key_bhsk.shape[2]
    probability = dropout_probability if dropout is not None else 0.0
    square = key_mask_bs is None and num_queries == num_keys
    assert square or documents is None, "documents need whole sequences and no padding"
    aligned_to_end = key_mask_bs is None and backend in ("flash2", "flash3", "flash4")
    if (square and backend in _KERNELS) or aligned_to_end:
        views = (tensor.transpose(1, 2) for tensor in (query_bhqk, key_bhsk, value_bhsk))
        attended_bthk: Tensor = _KERNELS[backend](*views, probability, documents)
        return attended_bthk.transpose(1, 2)
    plain = backend == "plain" or (probability > 0 and query_bhqk.device.type == "cpu")
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
        probability,
        dropout,
        site,
        part or HeadPart(0, query_bhqk.shape[1], num_keys),
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
    probability: float,
    dropout: DropoutSeed | None,
    site: int,
    part: HeadPart,
) -> Tensor:
    """Attention by its formula in fp32, with masks drawn from the global position."""
    scores_bhqs = query_bhqk.float() @ key_bhsk.float().transpose(-1, -2)
    scores_bhqs = scores_bhqs / math.sqrt(query_bhqk.shape[-1])
    weights_bhqs = scores_bhqs.masked_fill(~visible_bhqs, float("-inf")).softmax(dim=-1)
    if probability > 0:
        assert dropout is not None, "dropout needs its place in the run's random numbers"
        batch, heads, num_queries, num_keys = scores_bhqs.shape
        rows = torch.Size((batch * num_queries, part.num_heads * part.num_keys))
        mask, _ = dropout_masks(rows, probability, dropout, site, query_bhqk.device)
        mask_bqhs = mask.view(batch, num_queries, part.num_heads, part.num_keys)
        mask_bqhs = mask_bqhs[:, :, part.first_head : part.first_head + heads, :num_keys]
        weights_bhqs = weights_bhqs * mask_bqhs.transpose(1, 2)
    return (weights_bhqs @ value_bhsk.float()).to(query_bhqk.dtype)


def _packed(
    query_bthk: Tensor, key_bthk: Tensor, value_bthk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows one after another, [n, h, k]; a view, also of parts of the packed projection."""
    return query_bthk.flatten(0, 1), key_bthk.flatten(0, 1), value_bthk.flatten(0, 1)


def _flash2(
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """flash-attn 2."""
    from flash_attn import (  # type: ignore[import-not-found]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    attended: Tensor
    if documents is None:
        attended = flash_attn_func(
            query_bthk, key_bthk, value_bthk, dropout_p=probability, causal=True
        )
        return attended
    attended = flash_attn_varlen_func(
        *_packed(query_bthk, key_bthk, value_bthk),
        cu_seqlens_q=documents.starts,
        cu_seqlens_k=documents.starts,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        dropout_p=probability,
        causal=True,
    )
    return attended.view(query_bthk.shape)


def _without_dropout(
    module: str,
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """flash-attn 3 and 4, two modules whose functions take the same arguments.

    flash-attn 4 and the first releases of 3 also return the logarithms of the softmax's sums.
    """
    assert probability == 0.0, "flash-attn 3 and 4 have no dropout"
    package = importlib.import_module(module)
    if documents is None:
        result = package.flash_attn_func(query_bthk, key_bthk, value_bthk, causal=True)
    else:
        result = package.flash_attn_varlen_func(
            *_packed(query_bthk, key_bthk, value_bthk),
            cu_seqlens_q=documents.starts,
            cu_seqlens_k=documents.starts,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            causal=True,
        )
    attended: Tensor = result[0] if isinstance(result, tuple) else result
    return attended.view(query_bthk.shape)


@functools.lru_cache(maxsize=8)
def _transformer_engine_module(heads: int, head_size: int, probability: float) -> Any:
    """Transformer Engine's attention, which has no parameters but wants to be a module."""
    from transformer_engine.pytorch import (  # type: ignore[import-not-found]
        DotProductAttention,
    )

    return DotProductAttention(heads, head_size, attention_dropout=probability)


def _transformer_engine(
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """Transformer Engine; it returns the heads side by side."""
    module = _transformer_engine_module(query_bthk.shape[2], query_bthk.shape[3], probability)
    attended: Tensor
    if documents is None:
        attended = module(
            query_bthk, key_bthk, value_bthk, qkv_format="bshd", attn_mask_type="causal"
        )
    else:
        attended = module(
            *_packed(query_bthk, key_bthk, value_bthk),
            qkv_format="thd",
            cu_seqlens_q=documents.starts,
            cu_seqlens_kv=documents.starts,
            max_seqlen_q=documents.longest,
            max_seqlen_kv=documents.longest,
            attn_mask_type="padding_causal",
        )
    return attended.view(query_bthk.shape)


def _torch_cudnn(
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """PyTorch's cuDNN kernel."""
    assert documents is None, "cuDNN through PyTorch has no variable lengths"
    return _torch_kernel(SDPBackend.CUDNN_ATTENTION, query_bthk, key_bthk, value_bthk, probability)


def _torch_flash(
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """PyTorch's flash attention."""
    if documents is None:
        return _torch_kernel(
            SDPBackend.FLASH_ATTENTION, query_bthk, key_bthk, value_bthk, probability
        )
    assert probability == 0.0, "varlen_attn has no dropout"
    attended_nhk = varlen.varlen_attn(
        *_packed(query_bthk, key_bthk, value_bthk),
        cu_seq_q=documents.starts,
        cu_seq_k=documents.starts,
        max_q=documents.longest,
        max_k=documents.longest,
        window_size=(-1, 0),  # any key before, none after: causal
    )
    assert isinstance(attended_nhk, Tensor), "nothing else was asked for"
    return attended_nhk.view(query_bthk.shape)


def _torch_kernel(
    kernel: SDPBackend,
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
) -> Tensor:
    """PyTorch's attention by one kernel and no other."""
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(
            query_bthk.transpose(1, 2),
            key_bthk.transpose(1, 2),
            value_bthk.transpose(1, 2),
            dropout_p=probability,
            is_causal=True,
        ).transpose(1, 2)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "flash4": functools.partial(_without_dropout, "flash_attn.cute"),
    "flash3": functools.partial(_without_dropout, "flash_attn_interface"),
    "flash2": _flash2,
    "te": _transformer_engine,
    "cudnn": _torch_cudnn,
    "flash": _torch_flash,
}
"""Adapters: q, k, v [b, t, h, k], the dropout probability and the documents to [b, t, h, k]."""
