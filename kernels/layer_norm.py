"""LayerNorm over the last dimension, forward and backward, in Triton.

    mean = sum(x) / d;  rstd = 1 / sqrt(sum((x - mean)^2) / d + epsilon);  n = (x - mean) rstd
    y = n weight + bias
    with g = dy weight:  dx = rstd (g - sum(g) / d - n sum(g n) / d)
    dweight = sum over rows of dy n;  dbias = sum over rows of dy

Bytes, in units of one [rows, d] tensor: forward 2 (x in, y out), as PyTorch's; backward 3 (x, dy
in, dx out) against PyTorch's 5, which reads x and dy again for the weights' gradients. Here a fixed
number of programs each walks a block of rows with dweight and dbias in registers, and writes one
fp32 partial sum [programs, d]; these are added in a fixed order, so the result is the same in every
run on one kind of GPU. phi meets a plain LayerNorm only under the embedding: every other one is
part of `kernels.block_end`.

Layout: the last dimension has stride 1 (else it is copied), leading dimensions of any shape; one
row is one program's registers. Limits: fp32, bf16 or fp16; d <= 8192; weight and bias share a
dtype. Statistics and sums are fp32. Gain over torch.compile: not measured yet.

Suffixes: b batch, t time, d width, n = b x t rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on

MAX_WIDTH = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit  # type: ignore[untyped-decorator]
def normalize_row(x, inside, weight, bias, epsilon, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """LayerNorm of one fp32 row [block] that is 0 where not `inside`; returns y, mean, rstd."""
    mean = tl.sum(x, axis=0) / width
    # two passes over registers: sum(x^2) - mean^2 would cancel
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    return centred * rstd * weight + bias, mean, rstd


@triton.jit  # type: ignore[untyped-decorator]
def normalize_row_backward(x, dy, inside, weight, mean, rstd, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of `normalize_row` for x [block], and n = (x - mean) rstd; 0 where not `inside`."""
    normed = tl.where(inside, (x - mean) * rstd, 0.0)
    scaled = dy * weight
    mean_scaled = tl.sum(scaled, axis=0) / width
    mean_product = tl.sum(scaled * normed, axis=0) / width
    return rstd * (scaled - mean_scaled - normed * mean_product), normed


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    epsilon,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One row a program. `x_stride` elements between rows; y [n, d], mean and rstd fp32 [n]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y, mean, rstd = normalize_row(x, inside, weight, bias, epsilon, width)
    tl.store(y_ptr + row * width + columns, y, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dy_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    x_stride,
    dy_stride,
    num_rows,
    rows_per_program,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One block of rows a program; `partial_ptr` is fp32 [2, programs, d]: dweight, dbias."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([block], dtype=tl.float32)
    dbias = tl.zeros([block], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        dx, normed = normalize_row_backward(x, dy, inside, weight, mean, rstd, width)
        tl.store(dx_ptr + row * width + columns, dx, mask=inside)
        dweight += dy * normed
        dbias += dy
    partial_ptr += program * width + columns
    tl.store(partial_ptr, dweight, mask=inside)
    tl.store(partial_ptr + tl.num_programs(0).to(tl.int64) * width, dbias, mask=inside)


def block_size(width: int) -> int:
    """Elements of a row in a program's registers: the width rounded up to a power of two."""
    return max(16, 1 << (width - 1).bit_length())


def num_warps(width: int) -> int:
    """Warps a program. A table, not autotuning, since the order of sums depends on it."""
    return 4 if width <= 1024 else 8 if width <= 2048 else 16


def split_rows(num_rows: int, device: torch.device) -> tuple[int, int]:
    """Number of programs of a backward kernel and the rows of each.

    Two programs of eight warps fit on a multiprocessor; more would only add partial sums. The
    interpreter gets three, so that its tests meet both loops and partial sums.
    """
    wanted = 3
    if device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    rows_per_program = max(1, -(-num_rows // wanted))
    return max(1, -(-num_rows // rows_per_program)), rows_per_program


def as_rows(x_btd: Tensor) -> Tensor:
    """View as [n, d] with stride 1 in d; copies only where the layout has no such view."""
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    return x_nd if x_nd.stride(-1) == 1 else x_nd.contiguous()


def check(rows: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless the kernels can take these tensors.

    Args:
        rows: tensors [b, t, d] of one shape and dtype.
        vectors: tensors [d] of one dtype.
    """
    shape, dtype = rows[0].shape, rows[0].dtype
    width = shape[-1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width}: the LayerNorm kernels take 1 to {MAX_WIDTH} elements")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: the LayerNorm kernels take float32, bfloat16, float16")
    if any(x.shape != shape or x.dtype != dtype for x in rows):
        raise ValueError(f"all inputs must be {dtype} of shape {tuple(shape)}")
    if any(v.shape != (width,) or v.dtype != vectors[0].dtype for v in vectors):
        raise ValueError(f"weights and biases must share a dtype and have shape ({width},)")


def _forward(
    x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [b, t, d] in the dtype of `x_btd`, and fp32 mean and rstd [b, t]."""
    x_nd = as_rows(x_btd)
    y_btd = x_btd.new_empty(x_btd.shape)
    mean_bt, rstd_bt = (x_btd.new_empty(x_btd.shape[:-1], dtype=torch.float32) for _ in range(2))
    rows, width = x_nd.shape
    if rows:
        with launching_on(x_btd):
            forward_kernel[(rows,)](
                x_nd,
                weight_d.contiguous(),
                bias_d.contiguous(),
                y_btd,
                mean_bt,
                rstd_bt,
                x_nd.stride(0),
                epsilon,
                width,
                block_size(width),
                num_warps=num_warps(width),
            )
    return y_btd, mean_bt, rstd_bt


def _backward(
    dy_btd: Tensor, x_btd: Tensor, weight_d: Tensor, mean_bt: Tensor, rstd_bt: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx [b, t, d] in the dtype of `x_btd`, and fp32 [2, d]: dweight, dbias."""
    x_nd, dy_nd = as_rows(x_btd), as_rows(dy_btd)
    dx_btd = x_btd.new_empty(x_btd.shape)
    rows, width = x_nd.shape
    programs, rows_per_program = split_rows(rows, x_btd.device)
    partials = x_btd.new_empty((2, programs, width), dtype=torch.float32)
    with launching_on(x_btd):
        backward_kernel[(programs,)](
            x_nd,
            dy_nd,
            weight_d.contiguous(),
            mean_bt,
            rstd_bt,
            dx_btd,
            partials,
            x_nd.stride(0),
            dy_nd.stride(0),
            rows,
            rows_per_program,
            width,
            block_size(width),
            num_warps=num_warps(width),
        )
    return dx_btd, partials.sum(1)


_forward_op = torch.library.custom_op("megaphi::layer_norm", _forward, mutates_args=())
_backward_op = torch.library.custom_op("megaphi::layer_norm_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(
    x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [x_btd.new_empty(x_btd.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return x_btd.new_empty(x_btd.shape), statistics[0], statistics[1]


@_backward_op.register_fake
def _(
    dy_btd: Tensor, x_btd: Tensor, weight_d: Tensor, mean_bt: Tensor, rstd_bt: Tensor
) -> tuple[Tensor, Tensor]:
    sums = x_btd.new_empty((2, x_btd.shape[-1]), dtype=torch.float32)
    return x_btd.new_empty(x_btd.shape), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the input and two fp32 numbers a row; n is made again from them."""
    x_btd, weight_d, _, _ = inputs
    _, mean_bt, rstd_bt = output
    ctx.mark_non_differentiable(mean_bt, rstd_bt)
    ctx.save_for_backward(x_btd, weight_d, mean_bt, rstd_bt)


def _gradients(ctx: Any, backward: Any, dy_btd: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `_forward`, through `backward`: the body or the operator."""
    weight_d = ctx.saved_tensors[1]
    dx_btd, sums = backward(dy_btd, *ctx.saved_tensors)
    dweight_d, dbias_d = sums.to(weight_d.dtype).unbind()
    return dx_btd, dweight_d, dbias_d, None


class _LayerNorm(torch.autograd.Function):
    """The same as the operator, without the dispatcher's cost."""

    @staticmethod
    def forward(
        x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(x_btd, weight_d, bias_d, epsilon)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_btd: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, _backward, dy_btd)


_forward_op.register_autograd(
    lambda ctx, dy_btd, *_: _gradients(ctx, _backward_op, dy_btd), setup_context=_setup_context
)


def layer_norm(x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension; twin of `kernels.reference.layer_norm`.

    Args:
        x_btd: fp32, bf16 or fp16, any leading dimensions.
        weight_d: scale, of any of these dtypes.
        bias_d: shift, in the dtype of `weight_d`.
        epsilon: added to the variance.

    Returns:
        y like `x_btd`, contiguous.

    Raises:
        ValueError: a dtype, shape or width that the kernel does not take.
    """
    check((x_btd,), (weight_d, bias_d))
    y_btd: Tensor
    if torch.compiler.is_compiling():
        y_btd, _, _ = torch.ops.megaphi.layer_norm(x_btd, weight_d, bias_d, epsilon)
    else:
        y_btd, _, _ = _LayerNorm.apply(x_btd, weight_d, bias_d, epsilon)  # type: ignore[no-untyped-call]
    return y_btd
