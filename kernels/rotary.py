"""Rotary position embedding of the queries and keys, in place in the packed projection.

In each head the first r elements x1 and the next r elements x2 become

    y1 = x1 cos - x2 sin;   y2 = x2 cos + x1 sin

and its backward turns the gradient the other way (sin -> -sin). The rest of the queries and keys,
and the values, are not touched. Arithmetic is fp32, with one rounding at the end.

Bytes: with D the bytes of one token's hidden vector the packed projection is 3 D; phi-1 turns half
of every query and key, so that the forward reads and writes 1 D each, in runs of 64 bytes. The
unfused form slices, multiplies, concatenates and copies queries and keys: about 14 D. A form that
is not in place would move 6 D.
Gain over torch.compile: not measured yet.

What may be written over what:

- Forward, eager: over the projection, if autograd sees it as a plain view of the whole output of
  one operation, which is what a linear layer gives. The write is declared on that output and not on
  the view (`mark_dirty`), so autograd's bookkeeping stays exact, saved tensors are protected by
  their version, and no gradient is copied; declared on the view it would cost four copies of the
  gradient. Anything else (a leaf, a slice, a view that a custom function returned) gets a new
  tensor.
- Backward, eager: a new tensor, as the gradient is autograd's and may be in use elsewhere. One
  kernel copies and turns: 6 D.
- Under torch.compile, both directions: a mutating operation on a copy. Inductor drops the copy
  where nobody else needs the original, and then either direction is in place.

Layout: the packed projection contiguous (another one is copied); wide loads need r to be a power of
two of at least 8. Limits: head size up to 256, r at most half of it; float32, bfloat16, float16.

Shape suffixes: b batch, t time, h heads, c the parts q, k, v, k elements of a head, r pairs that
are turned.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on

MAX_HEAD_SIZE = 256
PAIRS = 1024
"""Pairs a program turns: 8 a thread, two 16-byte loads in bf16."""
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def rotary_packed_kernel(  # type: ignore[no-untyped-def]
    qkv,
    out,
    cosine,
    sine,
    table_rows,
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_SIZE: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    INVERSE: tl.constexpr,  # noqa: N803
    COPY: tl.constexpr,  # noqa: N803
    BLOCK_SLOTS: tl.constexpr,  # noqa: N803
    BLOCK_PAIRS: tl.constexpr,  # noqa: N803
    BLOCK_REST: tl.constexpr,  # noqa: N803
):
    """Turn one token's queries and keys; with COPY `out` also gets everything else.

    A slot is one part of one head: slots 3h, 3h + 1, 3h + 2 are q, k and v of head h.
    """
    token = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    if COPY:
        inside = slot < 3 * HEADS
    else:
        inside = slot < 2 * HEADS
        slot = slot // 2 * 3 + slot % 2
    pair = tl.arange(0, BLOCK_PAIRS)
    angle = (token % table_rows).to(tl.int64) * HALF + pair
    cos = tl.load(cosine + angle, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sine + angle, mask=pair < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin

    first = token.to(tl.int64) * (3 * HEADS * HEAD_SIZE)
    qkv += first
    out += first
    offset = slot[:, None] * HEAD_SIZE + pair[None, :]
    mask = inside[:, None] & (pair[None, :] < HALF)
    x1 = tl.load(qkv + offset, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv + offset + HALF, mask=mask, other=0.0).to(tl.float32)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    if COPY:
        is_value = (slot % 3 == 2)[:, None]
        y1 = tl.where(is_value, x1, y1)
        y2 = tl.where(is_value, x2, y2)
    tl.store(out + offset, y1.to(out.dtype.element_ty), mask=mask)
    tl.store(out + offset + HALF, y2.to(out.dtype.element_ty), mask=mask)
    if COPY and HEAD_SIZE > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        offset = slot[:, None] * HEAD_SIZE + rest[None, :]
        mask = inside[:, None] & (rest[None, :] < HEAD_SIZE)
        tl.store(out + offset, tl.load(qkv + offset, mask=mask), mask=mask)


def turn_packed(qkv: Tensor, out: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
    """Write `qkv`, turned, to `out`, which is `qkv` itself or a tensor like it.

    Args:
        qkv: [b, t, h, 3, k], contiguous.
        out: likewise.
        cosine: fp32 [t, r] or [b, t, r], contiguous.
        sine: likewise.
        inverse: turn by the opposite angles.
    """
    batch, time, heads, _, size = qkv.shape
    half = cosine.shape[-1]
    assert qkv.is_contiguous()
    assert out.is_contiguous()
    assert batch * time < 2**31, "one program a token"
    if qkv.numel() == 0:
        return
    copy = qkv.data_ptr() != out.data_ptr()
    slots = (3 if copy else 2) * heads
    block_pairs = triton.next_power_of_2(half)
    block_slots = min(triton.next_power_of_2(slots), max(1, PAIRS // block_pairs))
    with launching_on(qkv):
        rotary_packed_kernel[(batch * time, triton.cdiv(slots, block_slots))](
            qkv,
            out,
            cosine,
            sine,
            cosine.numel() // half,
            HEADS=heads,
            HEAD_SIZE=size,
            HALF=half,
            INVERSE=inverse,
            COPY=copy,
            BLOCK_SLOTS=block_slots,
            BLOCK_PAIRS=block_pairs,
            BLOCK_REST=triton.next_power_of_2(max(1, size - 2 * half)),
            num_warps=NUM_WARPS,
        )


@torch.library.custom_op("megaphi::rotary_packed_", mutates_args=("qkv",))
def rotary_packed_(qkv: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
    """Turn contiguous `qkv` in place; the form that torch.compile sees."""
    turn_packed(qkv, qkv, cosine, sine, inverse)


@rotary_packed_.register_fake
def _(qkv: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
    pass


class _InPlace(torch.autograd.Function):
    """Eager: writes over `whole`, the tensor of which `shape` is a view."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, shape: torch.Size, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn `whole` itself."""
        ctx.mark_dirty(whole)
        ctx.save_for_backward(cosine, sine)
        ctx.shape = shape
        qkv = whole.view(shape)
        turn_packed(qkv, qkv, cosine, sine, inverse=False)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Turn a copy of the gradient back."""
        packed = grad.contiguous().view(ctx.shape)
        turned = torch.empty_like(packed)
        cosine, sine = ctx.saved_tensors
        turn_packed(packed, turned, cosine, sine, inverse=True)
        return turned.view(grad.shape), None, None, None


class _NewTensor(torch.autograd.Function):
    """Eager: leaves the input as it is."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Copy and turn in one kernel."""
        ctx.save_for_backward(cosine, sine)
        qkv = qkv.contiguous()
        out = torch.empty_like(qkv)
        turn_packed(qkv, out, cosine, sine, inverse=False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Copy and turn back in one kernel."""
        grad = grad.contiguous()
        turned = torch.empty_like(grad)
        cosine, sine = ctx.saved_tensors
        turn_packed(grad, turned, cosine, sine, inverse=True)
        return turned, None, None


class _Compiled(torch.autograd.Function):
    """Under torch.compile: copies that Inductor removes where the original is not needed."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn a copy."""
        ctx.save_for_backward(cosine, sine)
        out = qkv.clone(memory_format=torch.contiguous_format)
        torch.ops.megaphi.rotary_packed_(out, cosine, sine, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Turn a copy of the gradient back."""
        cosine, sine = ctx.saved_tensors
        turned = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.megaphi.rotary_packed_(turned, cosine, sine, True)
        return turned, None, None


def _whole_output(qkv: Tensor) -> Tensor | None:
    """The tensor that holds exactly `qkv` and that autograd lets us write over, if there is one.

    Gradients reach the projection through its history and that of the base it is a view of. A view
    that a custom function returned has a base without one; a view made under no_grad has none.
    """
    whole = qkv._base if qkv._is_view() else qkv
    if whole is None or whole.numel() != qkv.numel():
        return None
    if not (whole.is_contiguous() and qkv.is_contiguous()):
        return None
    if qkv.requires_grad != whole.requires_grad:
        return None
    if qkv.requires_grad and (qkv.grad_fn is None or whole.grad_fn is None):
        return None
    return whole


def rotary_packed(qkv_bthck: Tensor, cosine_tr: Tensor, sine_tr: Tensor) -> Tensor:
    """Rotary position embedding of the queries and keys inside a packed projection.

    Args:
        qkv_bthck: packed projection, c = 3. May be written over: do not use it afterwards.
        cosine_tr: fp32 cosines of position x frequency, [t, r] or [b, t, r].
        sine_tr: fp32 sines, likewise.

    Returns:
        A tensor like `qkv_bthck`, contiguous.

    Raises:
        ValueError: shapes or dtypes that the kernel does not handle.
    """
    batch, time, _, parts, size = qkv_bthck.shape
    half = cosine_tr.shape[-1]
    if parts != 3 or size > MAX_HEAD_SIZE or not 0 < 2 * half <= size:
        raise ValueError(f"rotary: {parts} parts, head size {size}, {half} pairs to turn")
    if cosine_tr.shape not in ((time, half), (batch, time, half)):
        raise ValueError(f"rotary: tables {tuple(cosine_tr.shape)} for {batch} x {time} tokens")
    if sine_tr.shape != cosine_tr.shape:
        raise ValueError("rotary: cosines and sines differ in shape")
    if cosine_tr.dtype != torch.float32 or sine_tr.dtype != torch.float32:
        raise ValueError("rotary: the tables must be float32")
    cosine_tr, sine_tr = cosine_tr.contiguous(), sine_tr.contiguous()
    if torch.compiler.is_compiling():
        compiled: Tensor = _Compiled.apply(qkv_bthck, cosine_tr, sine_tr)  # type: ignore[no-untyped-call]
        return compiled
    whole = _whole_output(qkv_bthck)
    if whole is None:
        fresh: Tensor = _NewTensor.apply(qkv_bthck, cosine_tr, sine_tr)  # type: ignore[no-untyped-call]
        return fresh
    shape = qkv_bthck.shape
    if not (torch.is_grad_enabled() and qkv_bthck.requires_grad):
        turn_packed(whole.view(shape), whole.view(shape), cosine_tr, sine_tr, inverse=False)
        if not whole.is_inference():
            torch.autograd.graph.increment_version(whole)
        return qkv_bthck
    turned: Tensor = _InPlace.apply(whole, shape, cosine_tr, sine_tr)  # type: ignore[no-untyped-call]
    return turned.view(shape)
