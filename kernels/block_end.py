"""End of a phi block in one kernel: biases, dropout of both branches, residual add, LayerNorm.

    r = residual + mask_a (attention + bias_a) + mask_b (mlp + bias_b);  y = LayerNorm(r)
    backward, with e = dr + (LayerNorm's gradient of dy for r):
    dresidual = e;  dattention = mask_a e;  dmlp = mask_b e;  the biases' gradients are the sums of
    dattention and dmlp over rows;  dweight, dbias as in `kernels.layer_norm`

Bytes, in units of one [rows, d] tensor: forward 5 (three in, y and r out) against 13 of the
separate operations; backward 6 with dropout (dy, dr, r in; three gradients out), 4 without, when
the three are one tensor, against 15. The masks are never stored: the backward draws them again.
The backward walks a block of rows in each of a fixed number of programs, with four (without
dropout three) fp32 sums in registers; partial sums [programs, d] are added in a fixed order.

The masks are those of `kernels.dropout`; without dropout nothing of it is compiled in. The place in
the run comes in as host numbers, so a captured CUDA graph would replay one step's masks.

Layout: the last dimension has stride 1 (else it is copied), leading dimensions of any shape; one
row is one program's registers. Limits: fp32, bf16 or fp16; d <= 8192, and above 4096 the backward
with dropout spills registers; the three inputs share a dtype, the weights and biases share one.
Gain over torch.compile: not measured yet.

Suffixes: b batch, t time, d width, n = b x t rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on
from kernels.dropout import PLACE_ARGUMENTS, branch_rows, dropout_row, place_of
from kernels.layer_norm import (
    as_rows,
    block_size,
    check,
    normalize_row,
    normalize_row_backward,
    num_warps,
    split_rows,
)
from kernels.reference import DropoutSeed


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    attention_ptr,
    attention_bias_ptr,
    mlp_ptr,
    mlp_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    r_ptr,
    mean_ptr,
    rstd_ptr,
    attention_stride,
    mlp_stride,
    residual_stride,
    epsilon,
    seed: tl.int64,
    step: tl.int64,
    site: tl.int64,
    first_token: tl.int64,
    tokens_ptr,
    threshold: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One row a program; strides are elements between rows; y, r [n, d]; mean, rstd fp32 [n]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
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
    # the statistics are those of the rounded sum, which the backward reads
    rounded = (residual.to(tl.float32) + attention + mlp).to(r_ptr.dtype.element_ty)
    tl.store(r_ptr + row * width + columns, rounded, mask=inside)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y, mean, rstd = normalize_row(rounded.to(tl.float32), inside, weight, bias, epsilon, width)
    tl.store(y_ptr + row * width + columns, y, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    dr_ptr,
    r_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dattention_ptr,
    dmlp_ptr,
    partial_ptr,
    dy_stride,
    dr_stride,
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
    """One block of rows a program.

    `dr_ptr` may be None. `partial_ptr` is fp32 [3 or 4, programs, d]: dweight, dbias, dattention
    and, with dropout, dmlp. Without dropout only `dresidual_ptr` is written.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([block], dtype=tl.float32)
    dbias = tl.zeros([block], dtype=tl.float32)
    dbias_a = tl.zeros([block], dtype=tl.float32)
    dbias_b = tl.zeros([block], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        r = tl.load(r_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        total, normed = normalize_row_backward(r, dy, inside, weight, mean, rstd, width)
        if dr_ptr is not None:
            dr = tl.load(dr_ptr + row * dr_stride + columns, mask=inside, other=0.0)
            total += dr.to(tl.float32)
        dweight += dy * normed
        dbias += dy
        tl.store(dresidual_ptr + row * width + columns, total, mask=inside)
        if threshold > 0:
            mask_a, mask_b = dropout_row(
                row, seed, step, site, first_token, tokens_ptr, threshold, width, block
            )
            dattention, dmlp = mask_a * total, mask_b * total
            tl.store(dattention_ptr + row * width + columns, dattention, mask=inside)
            tl.store(dmlp_ptr + row * width + columns, dmlp, mask=inside)
            dbias_a += dattention
            dbias_b += dmlp
        else:
            dbias_a += total
    partial_ptr += program * width + columns
    part = tl.num_programs(0).to(tl.int64) * width
    tl.store(partial_ptr, dweight, mask=inside)
    tl.store(partial_ptr + part, dbias, mask=inside)
    tl.store(partial_ptr + 2 * part, dbias_a, mask=inside)
    if threshold > 0:
        tl.store(partial_ptr + 3 * part, dbias_b, mask=inside)


def _forward(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    residual_btd: Tensor,
    weight_d: Tensor,
    bias_d: Tensor,
    epsilon: float,
    place: list[int],
    tokens_n: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and r [b, t, d] in the inputs' dtype, and fp32 mean and rstd [b, t].

    `place` is seed, step, site and first token, `tokens_n` as in `DropoutSeed`; `threshold` 0
    means no dropout.
    """
    attention_nd, mlp_nd, residual_nd = map(as_rows, (attention_btd, mlp_btd, residual_btd))
    outputs = _empty_outputs(residual_btd)
    rows, width = residual_nd.shape
    if rows:
        with launching_on(residual_btd):
            forward_kernel[(rows,)](
                attention_nd,
                attention_bias_d.contiguous(),
                mlp_nd,
                mlp_bias_d.contiguous(),
                residual_nd,
                weight_d.contiguous(),
                bias_d.contiguous(),
                *outputs,
                *(x_nd.stride(0) for x_nd in (attention_nd, mlp_nd, residual_nd)),
                epsilon,
                *place,
                tokens_n,
                threshold,
                width,
                block_size(width),
                num_warps=num_warps(width),
            )
    return outputs


def _empty_outputs(residual_btd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous y, r [b, t, d] and fp32 mean, rstd [b, t]."""
    shape = residual_btd.shape
    y_btd, r_btd = residual_btd.new_empty(shape), residual_btd.new_empty(shape)
    mean_bt, rstd_bt = (residual_btd.new_empty(shape[:-1], dtype=torch.float32) for _ in range(2))
    return y_btd, r_btd, mean_bt, rstd_bt


def _backward(
    dy_btd: Tensor,
    dr_btd: Tensor | None,
    r_btd: Tensor,
    weight_d: Tensor,
    mean_bt: Tensor,
    rstd_bt: Tensor,
    place: list[int],
    tokens_n: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dresidual, dattention, dmlp [b, t, d] and fp32 sums [3 or 4, d].

    The sums are dweight, dbias and the gradients of the attention's and the MLP's bias. With
    threshold 0, dattention and dmlp equal dresidual and are not made: both come back empty, and the
    last sum is missing.
    """
    r_nd, dy_nd = as_rows(r_btd), as_rows(dy_btd)
    dr_nd = None if dr_btd is None else as_rows(dr_btd)
    rows, width = r_nd.shape
    programs, rows_per_program = split_rows(rows, r_btd.device)
    gradients = _empty_gradients(r_btd, threshold)
    partials = r_btd.new_empty((4 if threshold else 3, programs, width), dtype=torch.float32)
    with launching_on(r_btd):
        backward_kernel[(programs,)](
            dy_nd,
            dr_nd,
            r_nd,
            weight_d.contiguous(),
            mean_bt,
            rstd_bt,
            *gradients,
            partials,
            dy_nd.stride(0),
            0 if dr_nd is None else dr_nd.stride(0),
            rows,
            rows_per_program,
            *place,
            tokens_n,
            threshold,
            width,
            block_size(width),
            num_warps=num_warps(width),
        )
    return (*gradients, partials.sum(1))


def _empty_gradients(r_btd: Tensor, threshold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dresidual, and for dattention and dmlp where dropout makes them differ."""
    branch = r_btd.shape if threshold else torch.Size((0,))
    return r_btd.new_empty(r_btd.shape), r_btd.new_empty(branch), r_btd.new_empty(branch)


_forward_op = torch.library.custom_op(
    "megaphi::bias_dropout_add_layer_norm", _forward, mutates_args=()
)
_backward_op = torch.library.custom_op(
    "megaphi::bias_dropout_add_layer_norm_backward", _backward, mutates_args=()
)


@_forward_op.register_fake
def _(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    residual_btd: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(residual_btd)


@_backward_op.register_fake
def _(
    dy_btd: Tensor, dr_btd: Tensor | None, r_btd: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    threshold = rest[-1]
    sums = r_btd.new_empty((4 if threshold else 3, r_btd.shape[-1]), dtype=torch.float32)
    return (*_empty_gradients(r_btd, threshold), sums)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep r, which the next block keeps too, two fp32 numbers a row, and the place of the mask."""
    _, r_btd, mean_bt, rstd_bt = output
    ctx.place, tokens_n, ctx.threshold = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean_bt, rstd_bt)
    ctx.save_for_backward(r_btd, inputs[5], mean_bt, rstd_bt, tokens_n)


def _gradients(
    ctx: Any, backward: Any, dy_btd: Tensor | None, dr_btd: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `_forward`, through `backward`: the body or the operator."""
    *saved, tokens_n = ctx.saved_tensors
    r_btd, weight_d = saved[:2]
    if dy_btd is None:
        dy_btd = torch.zeros_like(r_btd)
    place = (ctx.place, tokens_n, ctx.threshold)
    dresidual, dattention, dmlp, sums = backward(dy_btd, dr_btd, *saved, *place)
    dweight, dbias, *branch_biases = sums.to(weight_d.dtype).unbind()
    if ctx.threshold == 0:
        dattention = dmlp = dresidual
    # without dropout both biases have one gradient
    dbias_a, dbias_b = branch_biases[0], branch_biases[-1]
    gradients = (dattention, dbias_a, dmlp, dbias_b, dresidual, dweight, dbias)
    return (*gradients, None, None, None, None)


class _BlockEnd(torch.autograd.Function):
    """The same as the operator, without the dispatcher's cost."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dy_btd: Tensor | None, dr_btd: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, _backward, dy_btd, dr_btd)


_forward_op.register_autograd(
    lambda ctx, dy_btd, dr_btd, *_: _gradients(ctx, _backward_op, dy_btd, dr_btd),
    setup_context=_setup_context,
)


def bias_dropout_add_layer_norm(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    residual_btd: Tensor,
    weight_d: Tensor,
    bias_d: Tensor,
    epsilon: float,
    probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """End of a phi block; twin of `kernels.reference.bias_dropout_add_layer_norm`.

    Args:
        attention_btd: output projection of the attention, without its bias.
        attention_bias_d: its bias.
        mlp_btd: second MLP projection, without its bias.
        mlp_bias_d: its bias.
        residual_btd: residual stream.
        weight_d: LayerNorm scale.
        bias_d: LayerNorm shift.
        epsilon: added to the variance.
        probability: dropout of each branch, at least 0 and below 1.
        dropout: place in the run's random numbers; None means no dropout.
        site: which dropout of the model this is.

    Returns:
        y and r, both [b, t, d] in the dtype of `residual_btd`; both carry gradients.

    Raises:
        ValueError: a dtype, shape, width or probability that the kernel does not take.
    """
    check((residual_btd, attention_btd, mlp_btd), (weight_d, bias_d, attention_bias_d, mlp_bias_d))
    place = place_of(probability, dropout, site)
    rows_and_biases = (attention_btd, attention_bias_d, mlp_btd, mlp_bias_d, residual_btd)
    inputs = (*rows_and_biases, weight_d, bias_d, epsilon, *place)
    y_btd: Tensor
    r_btd: Tensor
    if torch.compiler.is_compiling():
        y_btd, r_btd, _, _ = torch.ops.megaphi.bias_dropout_add_layer_norm(*inputs)
    else:
        y_btd, r_btd, _, _ = _BlockEnd.apply(*inputs)  # type: ignore[no-untyped-call]
    return y_btd, r_btd
