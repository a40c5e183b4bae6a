"""Biases and dropout of both branches of a phi block, and their sum, in Triton.

    z = mask_a (attention + bias_a) + mask_b (mlp + bias_b)
    backward:  dattention = mask_a dz;  dmlp = mask_b dz;  the biases' gradients are the sums of
    dattention and dmlp over rows

It is the first part of `kernels.block_end`, for tensor parallelism: there the branches are addends
that a reduce-scatter sums up before the residual stream and LayerNorm can join them.

Bytes, in units of one [rows, d] tensor: forward 3 (two in, z out) against 15 of the separate
operations (two biases, two masks made, multiplied and read, one sum); backward 3 with dropout (dz
in, two gradients out). Without dropout both gradients are dz itself, and PyTorch's column sum of it
is all there is to do. The masks are never stored: the backward draws them again, and needs nothing
of the forward but the place in the run. It walks a block of rows in each of a fixed number of
programs with both bias sums in registers, fp32; partial sums [2, programs, d] are added in a fixed
order. The masks are those of `kernels.dropout`.

Layout: the last dimension has stride 1 (else it is copied), leading dimensions of any shape; one
row is one program's registers. Limits: fp32, bf16 or fp16; d <= 8192; the branches share a dtype,
the biases share one. Gain over torch.compile: not measured yet.

Suffixes: b batch, t time, d width, n = b x t rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on
from kernels.dropout import PLACE_ARGUMENTS, branch_rows, dropout_row, place_of
from kernels.layer_norm import as_rows, block_size, check, num_warps, split_rows
from kernels.reference import DropoutSeed


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    attention_ptr,
    attention_bias_ptr,
    mlp_ptr,
    mlp_bias_ptr,
    z_ptr,
    attention_stride,
    mlp_stride,
    seed: tl.int64,
    step: tl.int64,
    site: tl.int64,
    first_token: tl.int64,
    tokens_ptr,
    threshold: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One row a program; strides are elements between rows; z [n, d]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    attention, mlp = branch_rows(
        attention_ptr,
        attention_bias_ptr,
        mlp_ptr,
        mlp_bias_ptr,
        attention_stride,
        mlp_stride,
        row,
        inside,
        seed,
        step,
        site,
        first_token,
        tokens_ptr,
        threshold,
        width,
        block,
    )
    z = (attention + mlp).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row * width + columns, z, mask=inside)


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    dz_ptr,
    dattention_ptr,
    dmlp_ptr,
    partial_ptr,
    dz_stride,
    num_rows,
    rows_per_program,
    seed: tl.int64,
    step: tl.int64,
    site: tl.int64,
    first_token: tl.int64,
    tokens_ptr,
    threshold: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One block of rows a program; `partial_ptr` is fp32 [2, programs, d]: both bias sums."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    dbias_a = tl.zeros([block], dtype=tl.float32)
    dbias_b = tl.zeros([block], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        dz = tl.load(dz_ptr + row * dz_stride + columns, mask=inside, other=0.0).to(tl.float32)
        mask_a, mask_b = dropout_row(
            row, seed, step, site, first_token, tokens_ptr, threshold, width, block
        )
        dattention, dmlp = mask_a * dz, mask_b * dz
        tl.store(dattention_ptr + row * width + columns, dattention, mask=inside)
        tl.store(dmlp_ptr + row * width + columns, dmlp, mask=inside)
        dbias_a += dattention
        dbias_b += dmlp
    partial_ptr += program * width + columns
    tl.store(partial_ptr, dbias_a, mask=inside)
    tl.store(partial_ptr + tl.num_programs(0).to(tl.int64) * width, dbias_b, mask=inside)


def _forward(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    place: list[int],
    tokens_n: Tensor | None,
    threshold: int,
) -> Tensor:
    """Return z [b, t, d] in the branches' dtype; the last three from `place_of`."""
    attention_nd, mlp_nd = as_rows(attention_btd), as_rows(mlp_btd)
    z_btd = attention_btd.new_empty(attention_btd.shape)
    rows, width = attention_nd.shape
    if rows:
        with launching_on(attention_btd):
            forward_kernel[(rows,)](
                attention_nd,
                attention_bias_d.contiguous(),
                mlp_nd,
                mlp_bias_d.contiguous(),
                z_btd,
                attention_nd.stride(0),
                mlp_nd.stride(0),
                *place,
                tokens_n,
                threshold,
                width,
                block_size(width),
                num_warps=num_warps(width),
            )
    return z_btd


def _backward(
    dz_btd: Tensor, place: list[int], tokens_n: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dattention and dmlp [b, t, d], and fp32 sums of each over rows [2, d]."""
    assert threshold > 0, "without dropout both gradients are dz"
    dz_nd = as_rows(dz_btd)
    rows, width = dz_nd.shape
    programs, rows_per_program = split_rows(rows, dz_btd.device)
    dattention_btd, dmlp_btd = (dz_btd.new_empty(dz_btd.shape) for _ in range(2))
    partials = dz_btd.new_empty((2, programs, width), dtype=torch.float32)
    with launching_on(dz_btd):
        backward_kernel[(programs,)](
            dz_nd,
            dattention_btd,
            dmlp_btd,
            partials,
            dz_nd.stride(0),
            rows,
            rows_per_program,
            *place,
            tokens_n,
            threshold,
            width,
            block_size(width),
            num_warps=num_warps(width),
        )
    return dattention_btd, dmlp_btd, partials.sum(1)


_forward_op = torch.library.custom_op("megaphi::bias_dropout_add", _forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "megaphi::bias_dropout_add_backward", _backward, mutates_args=()
)


@_forward_op.register_fake
def _(attention_btd: Tensor, *_: Any) -> Tensor:
    return attention_btd.new_empty(attention_btd.shape)


@_backward_op.register_fake
def _(dz_btd: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = dz_btd.new_empty((2, dz_btd.shape[-1]), dtype=torch.float32)
    return dz_btd.new_empty(dz_btd.shape), dz_btd.new_empty(dz_btd.shape), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the place of the masks and nothing of the branches."""
    ctx.place, tokens_n, ctx.threshold = inputs[4:]
    ctx.bias_dtype = inputs[1].dtype
    ctx.save_for_backward(tokens_n)


def _gradients(ctx: Any, backward: Any, dz_btd: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `_forward`, through `backward`: the body or the operator."""
    if ctx.threshold == 0:
        dbias = dz_btd.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dz_btd, dbias, dz_btd, dbias, None, None, None
    (tokens_n,) = ctx.saved_tensors
    dattention, dmlp, sums = backward(dz_btd, ctx.place, tokens_n, ctx.threshold)
    dbias_a, dbias_b = sums.to(ctx.bias_dtype).unbind()
    return dattention, dbias_a, dmlp, dbias_b, None, None, None


class _BiasDropoutAdd(torch.autograd.Function):
    """The same as the operator, without the dispatcher's cost."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz_btd: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, _backward, dz_btd)


_forward_op.register_autograd(
    lambda ctx, dz_btd: _gradients(ctx, _backward_op, dz_btd), setup_context=_setup_context
)


def bias_dropout_add(
    attention_nd: Tensor,
    attention_bias_d: Tensor,
    mlp_nd: Tensor,
    mlp_bias_d: Tensor,
    probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
) -> Tensor:
    """mask_a (attention + bias_a) + mask_b (mlp + bias_b); twin of the one in `reference`.

    Args:
        attention_nd: output projection of the attention, without its bias.
        attention_bias_d: its bias.
        mlp_nd: second MLP projection, without its bias.
        mlp_bias_d: its bias.
        probability: dropout of each branch, at least 0 and below 1.
        dropout: place in the run's random numbers; None means no dropout.
        site: which dropout of the model this is.

    Returns:
        [n, d] in the dtype of `attention_nd`; the sum is made in fp32.

    Raises:
        ValueError: a dtype, shape, width or probability that the kernel does not take.
    """
    check((attention_nd, mlp_nd), (attention_bias_d, mlp_bias_d))
    place = place_of(probability, dropout, site)
    inputs = (attention_nd, attention_bias_d, mlp_nd, mlp_bias_d, *place)
    z_nd: Tensor
    if torch.compiler.is_compiling():
        z_nd = torch.ops.megaphi.bias_dropout_add(*inputs)
    else:
        z_nd = _BiasDropoutAdd.apply(*inputs)  # type: ignore[no-untyped-call]
    return z_nd
