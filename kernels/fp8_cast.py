"""Casts to FP8 for matrix products: scale from the largest value, cast, cast in two layouts.

    amax = max |x|;   scale = limit / amax;   q = fp8(clamp(x scale, -limit, limit))

with limit 448 (e4m3) or 57344 (e5m2), rounding to nearest even in the hardware's conversion. A
value that is not finite becomes NaN instead of being clamped, and so reaches the loss.

FP8 products on Hopper read both factors along the inner dimension, and of the three products of a
linear layer (result, gradient of the input, of the weight) each tensor takes part in two with
different inner dimensions: so it is needed row by row and transposed. One pass writes both, and
with delayed scaling also finds the largest value for the steps to come.

Bytes an element of a 16-bit tensor: `fp8_scale` 2; `fp8_cast` 3; `fp8_cast_transpose` 4 (2 in, 1 +
1 out) against 3 + 2 for a cast and a transposed copy of it, and 6 with the search for the largest
value as a pass of its own. Gain over torch.compile: not measured yet.

The maximum is taken over the bits of |x| as integers: they order as the numbers do, with NaN above
infinity, so that NaN is not lost. Partial maxima, one a tile, are written and then reduced, without
atomics; a maximum does not depend on the order anyway.

Layout: rows of any stride, contiguous within. Wide loads and stores need widths that are multiples
of 16; the transpose's rows are padded to one with zeros, which add nothing to a product.
Limits: float32, bfloat16, float16; fewer than 2^31 columns; compute capability 8.9 or higher, since
earlier GPUs have no e4m3.

Suffixes: n rows, k columns, p tiles, r = n rounded up to a multiple of 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on
from kernels.reference_fp8 import ROW_MULTIPLE

BLOCK_N, BLOCK_K = 64, 128
NUM_WARPS = 8
REDUCE_BLOCK = 4096
MINIMUM_CAPABILITY = (8, 9)
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit  # type: ignore[untyped-decorator]
def cast_kernel(  # type: ignore[no-untyped-def]
    x,
    scale,
    rows,
    columns,
    partial_amax,
    x_stride,
    n,
    k,
    padded_n,
    LIMIT: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
):
    """One tile. Each of `rows` [n, k], `columns` [k, padded_n], `partial_amax` [p] may be None."""
    tiles_k = tl.cdiv(k, BLOCK_K)
    tile = tl.program_id(0)
    row = (tile // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tile % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < n)[:, None] & (column < k)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if partial_amax is not None:
        largest = tl.max(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
        tl.store(partial_amax + tile, largest.to(tl.float32, bitcast=True))
    if rows is not None:
        scaled = value * tl.load(scale)
        # a finite value may overflow when scaled, and saturates; one that was not finite shows
        shows = (tl.abs(value) < float("inf")) & (scaled == scaled)
        clamped = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
        quantized = tl.where(shows, clamped, float("nan")).to(rows.dtype.element_ty)
        tl.store(rows + row[:, None] * k + column[None, :], quantized, mask=inside)
        if columns is not None:
            place = columns + column[:, None] * padded_n + row[None, :]
            filled = (column < k)[:, None] & (row < padded_n)[None, :]
            tl.store(place, tl.trans(quantized), mask=filled)


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    partial_amax,
    scale,
    inverse,
    count,
    LIMIT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program: the maximum of `count` partial maxima, and the scale that follows from it."""
    index = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, count, BLOCK):
        part = tl.load(partial_amax + first + index, mask=first + index < count, other=0.0)
        largest = tl.maximum(largest, part.to(tl.int32, bitcast=True))
    amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    usable = (amax < float("inf")) & (amax >= 2.0**-100)
    divisor = tl.where(usable, amax, LIMIT)
    tl.store(scale, LIMIT / divisor)
    tl.store(inverse, divisor / LIMIT)


def refuse_old_device(capability: tuple[int, int], name: str) -> None:
    """Say that a GPU has no e4m3 before the compiler says it in other words.

    Raises:
        ValueError: `capability` is below 8.9.
    """
    if capability < MINIMUM_CAPABILITY:
        raise ValueError(
            f"the FP8 casts need compute capability 8.9 or higher, which has e4m3; {name} has "
            f"{capability[0]}.{capability[1]}"
        )


def _check(x_nk: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """`x_nk` with contiguous rows.

    Raises:
        ValueError: an argument that the kernels do not take.
    """
    if x_nk.ndim != 2 or x_nk.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the FP8 casts take float32, bfloat16 or float16 [n, k], not {x_nk.dtype} "
            f"{tuple(x_nk.shape)}"
        )
    if dtype not in FORMATS:
        raise ValueError(f"the FP8 formats are float8_e4m3fn and float8_e5m2, not {dtype}")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise ValueError(f"the scale must be one float32, not {scale.dtype} {tuple(scale.shape)}")
    if x_nk.is_cuda:
        device = x_nk.device
        refuse_old_device(
            torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        )
    return x_nk if x_nk.stride(1) == 1 else x_nk.contiguous()


def _launch(
    x_nk: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    rows_nk: Tensor | None = None,
    columns_kr: Tensor | None = None,
    partial_amax_p: Tensor | None = None,
) -> None:
    """Fill the tensors that are given from one pass over `x_nk`."""
    tiles = count_tiles(x_nk)
    if tiles == 0:
        return
    with launching_on(x_nk):
        cast_kernel[(tiles,)](
            x_nk,
            scale,
            rows_nk,
            columns_kr,
            partial_amax_p,
            x_nk.stride(0),
            x_nk.shape[0],
            x_nk.shape[1],
            0 if columns_kr is None else columns_kr.shape[1],
            LIMIT=torch.finfo(dtype).max,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
        )


def count_tiles(x_nk: Tensor) -> int:
    """Programs of `cast_kernel`; each has one partial maximum."""
    rows, columns = x_nk.shape
    return -(-rows // BLOCK_N) * -(-columns // BLOCK_K)


def _scale(x_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Body of `fp8_scale`."""
    x_nk = _check(x_nk, dtype)
    partial_amax_p = x_nk.new_empty(count_tiles(x_nk), dtype=torch.float32)
    scale, inverse = (x_nk.new_empty((), dtype=torch.float32) for _ in range(2))
    _launch(x_nk, dtype, partial_amax_p=partial_amax_p)
    with launching_on(x_nk):
        scale_kernel[(1,)](
            partial_amax_p,
            scale,
            inverse,
            partial_amax_p.numel(),
            LIMIT=torch.finfo(dtype).max,
            BLOCK=REDUCE_BLOCK,
            num_warps=NUM_WARPS,
        )
    return scale, inverse


def _cast(x_nk: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Body of `fp8_cast`."""
    x_nk = _check(x_nk, dtype, scale)
    rows_nk = x_nk.new_empty(x_nk.shape, dtype=dtype)
    _launch(x_nk, dtype, scale, rows_nk)
    return rows_nk


def _outputs(x_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of `fp8_cast_transpose`."""
    rows, columns = x_nk.shape
    padded = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    return (
        x_nk.new_empty((rows, columns), dtype=dtype),
        x_nk.new_empty((columns, padded), dtype=dtype),
        x_nk.new_empty(count_tiles(x_nk), dtype=torch.float32),
    )


def _cast_transpose(
    x_nk: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Body of `fp8_cast_transpose`."""
    x_nk = _check(x_nk, dtype, scale)
    rows_nk, columns_kr, partial_amax_p = _outputs(x_nk, dtype)
    _launch(x_nk, dtype, scale, rows_nk, columns_kr, partial_amax_p)
    return rows_nk, columns_kr, partial_amax_p


_scale_operator = torch.library.custom_op("megaphi::fp8_scale", _scale, mutates_args=())
_cast_operator = torch.library.custom_op("megaphi::fp8_cast", _cast, mutates_args=())
_cast_transpose_operator = torch.library.custom_op(
    "megaphi::fp8_cast_transpose", _cast_transpose, mutates_args=()
)


@_scale_operator.register_fake
def _(x_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale, inverse = (x_nk.new_empty((), dtype=torch.float32) for _ in range(2))
    return scale, inverse


@_cast_operator.register_fake
def _(x_nk: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x_nk.new_empty(x_nk.shape, dtype=dtype)


_cast_transpose_operator.register_fake(lambda x_nk, scale, dtype: _outputs(x_nk, dtype))


@torch.no_grad()
def fp8_scale(x_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and inverse scale for a cast; twin of `kernels.reference_fp8.fp8_scale`.

    Args:
        x_nk: fp32, bf16 or fp16; no gradient flows.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        Two fp32 scalars on the device of `x_nk`; both are 1 for zeros and where a value is not
        finite.

    Raises:
        ValueError: an argument that the kernels do not take, or a GPU without e4m3.
    """
    run = _scale_operator if torch.compiler.is_compiling() else _scale
    result: tuple[Tensor, Tensor] = run(x_nk, dtype)
    return result


@torch.no_grad()
def fp8_cast(x_nk: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x times scale to FP8, saturating; twin of `kernels.reference_fp8.fp8_cast`.

    Args:
        x_nk: fp32, bf16 or fp16; no gradient flows.
        scale: fp32 scalar on the same device.
        dtype: float8_e4m3fn or float8_e5m2.

    Raises:
        ValueError: an argument that the kernels do not take, or a GPU without e4m3.
    """
    run = _cast_operator if torch.compiler.is_compiling() else _cast
    result: Tensor = run(x_nk, scale, dtype)
    return result


@torch.no_grad()
def fp8_cast_transpose(
    x_nk: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Both layouts from one pass; twin of `kernels.reference_fp8.fp8_cast_transpose`.

    Args:
        x_nk: fp32, bf16 or fp16; no gradient flows.
        scale: fp32 scalar on the same device.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        FP8 [n, k]; its transpose [k, r] with zeros beyond n; fp32 [p], whose largest is that of
        |x|.

    Raises:
        ValueError: an argument that the kernels do not take, or a GPU without e4m3.
    """
    run = _cast_transpose_operator if torch.compiler.is_compiling() else _cast_transpose
    result: tuple[Tensor, Tensor, Tensor] = run(x_nk, scale, dtype)
    return result
