"""Adapters to attention kernels, one function each; nearly all are of other packages.

Each takes q, k and v [b, t, h, k], the dropout probability and the documents, and returns
[b, t, h, k]. They follow the documentation of the packages: flash-attn 2 (`flash_attn`), 3
(`flash_attn_interface`, from the folder `hopper` of its repository) and 4 (`flash_attn.cute`),
Transformer Engine's `DotProductAttention`, and PyTorch's `scaled_dot_product_attention` and
`varlen_attn`. No adapter copies its inputs: they are strided views of the packed projection, and
every kernel takes strides.

A new kernel needs its function and its row in `KERNELS` here, its limits in
`megaphi.model.attention_backends`, and its name in `megaphi.config.AttentionBackend`.

Suffixes: b batch, h heads, t positions, n positions of all rows one after another, k elements of a
head.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from megaphi.data.documents import Documents
from megaphi.model.short_attention import short_attention


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
    from flash_attn import (
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
    from transformer_engine.pytorch import (
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


def _short(
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    probability: float,
    documents: Documents | None,
) -> Tensor:
    """Our own for short sequences on a CPU."""
    assert documents is None, "short attention does not keep documents apart"
    assert probability == 0.0, "short attention has no dropout"
    return short_attention(
        query_bthk.transpose(1, 2), key_bthk.transpose(1, 2), value_bthk.transpose(1, 2)
    ).transpose(1, 2)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "flash4": functools.partial(_without_dropout, "flash_attn.cute"),
    "flash3": functools.partial(_without_dropout, "flash_attn_interface"),
    "flash2": _flash2,
    "te": _transformer_engine,
    "cudnn": _torch_cudnn,
    "flash": _torch_flash,
    "short": _short,
}
"""By the name in `compute.attention`; `short` is chosen by `auto` only."""

ALIGNED_TO_END = ("flash2", "flash3", "flash4")
"""Those whose last query sees the last key where there are fewer queries than keys."""
