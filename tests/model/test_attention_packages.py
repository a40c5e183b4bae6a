"""The adapters of flash-attn, Transformer Engine and PyTorch's GPU kernels.

Those run on GPUs only: stand-ins with their documented signatures check what they are given and
compute by the formula, so that the adapters are run everywhere.
"""

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from kernels.ops import DropoutSeed
from megaphi.data.documents import Documents
from megaphi.model import attention_kernels
from megaphi.model.attention import AttentionOptions, Sequences, attention
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


class Calls(list[dict[str, Any]]):
    """The arguments of each call, defaults included."""

    def record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its calls recorded."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def recorded(*positional: Any, **named: Any) -> Any:
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            self.append(dict(bound.arguments))
            return function(*positional, **named)

        return recorded


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [b, t, h, k], written out; the last query at the last key."""
    (time, size), keys = (query.shape[1], query.shape[3]), key.shape[1]
    scores = torch.einsum("bqhk,bshk->bhqs", query, key) / size**0.5
    future = torch.ones(time, keys).triu(keys - time + 1).bool()
    return torch.einsum(
        "bhqs,bshk->bqhk", scores.masked_fill(future, -torch.inf).softmax(-1), value
    )


def variable(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention of documents [n, h, k] side by side, after checking their bounds."""
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(query) == len(key) == len(value)
    pairs = [(a, b) for a, b in itertools.pairwise(bounds) if a != b]
    assert all(0 < b - a <= longest for a, b in pairs)
    sections = [dense(query[None, a:b], key[None, a:b], value[None, a:b])[0] for a, b in pairs]
    return torch.cat(sections)


def flash_attn_2(calls: Calls) -> dict[str, Any]:
    """flash-attn 2.8's functions."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return dense(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        return variable(q, k, v, cu_seqlens_q, max_seqlen_q)

    return {
        "flash_attn_func": calls.record(flash_attn_func),
        "flash_attn_varlen_func": calls.record(flash_attn_varlen_func),
    }


def flash_attn_3(calls: Calls, with_sums: bool = False) -> dict[str, Any]:
    """flash-attn 3's functions; its first releases also returned the logarithms of the sums."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        out = dense(q, k, v)
        return (out, torch.zeros(())) if with_sums else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        out = variable(q, k, v, cu_seqlens_q, max_seqlen_q)
        return (out, torch.zeros(())) if with_sums else out

    return {
        "flash_attn_func": calls.record(flash_attn_func),
        "flash_attn_varlen_func": calls.record(flash_attn_varlen_func),
    }


def flash_attn_4(calls: Calls) -> dict[str, Any]:
    """flash-attn 4's functions, which always return a pair."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, return_lse=False,
    ):  # fmt: skip
        return dense(q, k, v), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, return_lse=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        return variable(q, k, v, cu_seqlens_q, max_seqlen_q), None

    return {
        "flash_attn_func": calls.record(flash_attn_func),
        "flash_attn_varlen_func": calls.record(flash_attn_varlen_func),
    }


def transformer_engine(calls: Calls) -> dict[str, Any]:
    """Transformer Engine's module; the result has the heads side by side."""

    class DotProductAttention:
        def __init__(
            self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
            qkv_format="sbhd", attn_mask_type="causal", window_size=None,
        ) -> None:  # fmt: skip
            self.shape = (num_attention_heads, kv_channels)
            self.attention_dropout = attention_dropout

        def __call__(self, *positional: Any, **named: Any) -> Tensor:
            result = calls.record(self.forward)(*positional, **named)
            calls[-1]["dropout_p"] = self.attention_dropout
            return result

        def forward(
            self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None,
            qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None,
            cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
            window_size=None,
        ):  # fmt: skip
            inputs = (query_layer, key_layer, value_layer)
            assert query_layer.shape[-2:] == self.shape
            if qkv_format == "bshd":
                assert attn_mask_type == "causal"
                return dense(*inputs).flatten(2)
            assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
            assert cu_seqlens_q is cu_seqlens_kv
            assert max_seqlen_q == max_seqlen_kv
            return variable(*inputs, cu_seqlens_q, max_seqlen_q).flatten(1)

    return {"DotProductAttention": DotProductAttention}


STAND_INS: dict[str, tuple[tuple[str, ...], Callable[[Calls], dict[str, Any]]]] = {
    "flash2": (("flash_attn",), flash_attn_2),
    "flash3": (("flash_attn_interface",), flash_attn_3),
    "flash3, first release": (
        ("flash_attn_interface",), functools.partial(flash_attn_3, with_sums=True)
    ),
    "flash4": (("flash_attn", "flash_attn.cute"), flash_attn_4),
    "te": (("transformer_engine", "transformer_engine.pytorch"), transformer_engine),
}  # fmt: skip


def forget_packages() -> None:
    """Let the module import the packages anew."""
    for value in list(vars(attention_kernels).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Calls]]:
    """Put a stand-in where its package would be; returns what it is called with."""

    def put(name: str) -> Calls:
        calls = Calls()
        modules, functions = STAND_INS[name]
        for module in modules:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        vars(sys.modules[modules[-1]]).update(functions(calls))
        return calls

    forget_packages()
    yield put
    forget_packages()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", STAND_INS)
def test_packages_get_what_they_document(
    packed: Tensor, install: Callable[[str], Calls], name: str, lengths: Any
) -> None:
    calls = install(name)
    documents = None if lengths is None else documents_of(TOKENS)
    backend: Any = name.split(",")[0]
    result = attention(
        *parts(packed), AttentionOptions(backend=backend), Sequences(documents=documents)
    )
    same(packed, result, lambda exact: formula(exact, visible(lengths)))
    (call,) = calls
    shape = (ROWS, TIME, HEADS, SIZE) if lengths is None else (ROWS * TIME, HEADS, SIZE)
    for index, names in enumerate((("q", "query_layer"), ("k", "key_layer"), ("v", "value_layer"))):
        tensor = next(call[key] for key in names if key in call)
        assert tensor.shape == shape
        assert tensor.stride(-1) == 1
        # no copy on the way: the tensor is the part `index` of the projection
        assert tensor.data_ptr() == packed.data_ptr() + 4 * index * SIZE
    assert call.get("causal", "causal" in (call.get("attn_mask_type") or "")) is True
    assert call.get("softmax_scale") is None
    if lengths is not None:
        assert call["max_seqlen_q"] == TIME


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_flash_attention_aligns_fewer_queries_to_the_last_key(
    packed: Tensor, install: Callable[[str], Calls], name: Any
) -> None:
    """As the chunks of context parallelism need it; no explicit mask is made."""
    calls = install(name)
    query, key, value = parts(packed)
    last = attention(
        query[:, :, 8:14], key[:, :, :14], value[:, :, :14], AttentionOptions(backend=name)
    )
    expected = formula(packed, visible(None))[:, :, 8:14]
    torch.testing.assert_close(last.double(), expected, rtol=1e-5, atol=2e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("documents", [None, documents_of(TOKENS)], ids=["whole", "documents"])
@pytest.mark.parametrize("name", ["flash2", "te"])
def test_dropout_reaches_the_packages(
    packed: Tensor, install: Callable[[str], Calls], name: Any, documents: Documents | None
) -> None:
    calls = install(name)
    seed = DropoutSeed(seed=1, step=1, first_token=0)
    for place in (seed, None):
        attention(
            *parts(packed),
            AttentionOptions(backend=name, dropout_probability=0.125),
            Sequences(dropout=place, documents=documents),
        )
    assert [call["dropout_p"] for call in calls] == [0.125, 0.0]


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_dropout_is_never_dropped_silently(
    packed: Tensor, install: Callable[[str], Calls], name: Any
) -> None:
    install(name)
    seed = DropoutSeed(seed=1, step=1, first_token=0)
    with pytest.raises(AssertionError, match="no dropout"):
        attention(
            *parts(packed),
            AttentionOptions(backend=name, dropout_probability=0.1),
            Sequences(dropout=seed),
        )


def test_torch_varlen(packed: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's variable-length attention, which has no CPU kernel, by its real signature."""
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*positional: Any, **named: Any) -> Tensor:
        call = signature.bind(*positional, **named).arguments
        assert call["window_size"] == (-1, 0)
        assert call["cu_seq_q"] is call["cu_seq_k"]
        assert call["max_q"] == call["max_k"] == TIME
        assert call["query"].data_ptr() == packed.data_ptr()
        inputs = (call["query"], call["key"], call["value"])
        return variable(*inputs, call["cu_seq_q"], call["max_q"])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    result = attention(
        *parts(packed),
        AttentionOptions(backend="flash"),
        Sequences(documents=documents_of(TOKENS)),
    )
    same(packed, result, lambda exact: formula(exact, visible(LENGTHS)))


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_torch_kernels_are_forced(
    packed: Tensor, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    """One kernel is allowed during the call and no other, so that none is taken silently."""
    seen = []

    def stand_in(query, key, value, dropout_p=0.0, is_causal=False):
        flags = torch.backends.cuda
        allowed = {
            "cudnn": flags.cudnn_sdp_enabled(),
            "flash": flags.flash_sdp_enabled(),
            "efficient": flags.mem_efficient_sdp_enabled(),
            "math": flags.math_sdp_enabled(),
        }
        seen.append(([name for name, on in allowed.items() if on], dropout_p, is_causal))
        assert query.shape == (ROWS, HEADS, TIME, SIZE)
        return dense(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
    seed = DropoutSeed(seed=1, step=1, first_token=0)
    result = attention(
        *parts(packed),
        AttentionOptions(backend=backend, dropout_probability=0.125),
        Sequences(dropout=seed),
    )
    same(packed, result, lambda exact: formula(exact, visible(None)))
    assert seen == [([backend], 0.125, True)]
