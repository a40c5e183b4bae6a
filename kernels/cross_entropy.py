"""Head projection and cross-entropy, whose gradient takes the place of the logits.

For each chunk of rows, with logits z = x W^T + b in the dtype of x:

    loss = logsumexp(z) - z[label];   dz = softmax(z) - onehot(label);
    dx = dz W;   dW += dz^T x;   db += column sums of dz

Everything between the matrix products is one kernel, one program a row: both passes of
`kernels.softmax`, the second of which writes dz over z. All arithmetic is fp32.

Bytes: with V x 2 bytes a bf16 row of logits, the kernel reads the row, reads it again (102 kB at
V = 51,200: from L2, where the rows in flight fit) and writes it. The unfused form holds the logits
in fp32 and passes over them for the conversion, the maximum and the sum, the exponentials, and the
conversion back: 20 bytes a logit and more, against 4 to 6. One buffer of [chunk_rows, V] logits
serves all chunks, with no fp32 copy alongside it: 0.42 GB at 4,096 x 51,200.
Gain over torch.compile: not measured yet.

The bias gradient is PyTorch's column sum with fp32 accumulation: one further read of dz,
reproducible, no float atomics. In the kernel it would take fp32 partials [programs, V], read and
written once a row, which is more traffic than the read that it saves.

The weight gradient adds up in fp32. With bf16 or fp16 on CUDA the product goes through
`torch.addmm(..., out_dtype=torch.float32)`, which adds without rounding each chunk's product to the
narrow type. That branch exists on CUDA only and HAS NOT BEEN RUN: tests check its signature alone.
Elsewhere `kernels.matmul.add_product_` converts the factors to fp32 first.

Layout: logits rows contiguous; wide loads need V to be a multiple of 16 / itemsize. Limits: x,
weight and bias of one dtype (float32, bfloat16, float16; float64 keeps only fp32 accuracy), one
device, and the whole vocabulary on it. A label outside [0, V) reads nothing out of bounds: its loss
and the gradients of its row are NaN, so the step is skipped as any non-finite one.

Shape suffixes: n rows, d hidden width, v vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on
from kernels.matmul import add_product_
from kernels.reference import rows_per_chunk
from kernels.softmax import launch_settings, row_statistics, target_logit, write_row_gradient


@triton.jit  # type: ignore[untyped-decorator]
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    losses_ptr,
    row_stride,
    vocab_size,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
):
    """Loss of one row; `with_gradient`, its dlogits take the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row).to(tl.int64)
    valid, target = target_logit(logits_ptr, label, vocab_size)
    maximum, total = row_statistics(logits_ptr, vocab_size, block)
    # NaN spreads from here to the loss and to the whole row of gradients.
    total = tl.where(valid, total, float("nan"))
    # In this order: next to a large maximum the logarithm would lose its digits.
    tl.store(losses_ptr + row, (maximum - target) + tl.log(total))

    if with_gradient:
        tl.debug_barrier()  # every thread has read the target before one overwrites it
        write_row_gradient(logits_ptr, label, maximum, total, vocab_size, block)


def cross_entropy_(
    logits_nv: Tensor, labels_n: Tensor, losses_n: Tensor, with_gradient: bool
) -> None:
    """Write the loss of each row and, with `with_gradient`, dlogits over the logits.

    Args:
        logits_nv: logits, contiguous in the last dimension.
        labels_n: integer target ids.
        losses_n: fp32 output.
        with_gradient: whether to overwrite `logits_nv` with softmax - onehot, in its dtype.
    """
    rows, vocab_size = logits_nv.shape
    assert logits_nv.stride(1) == 1
    assert labels_n.is_contiguous()
    assert losses_n.is_contiguous()
    block, num_warps = launch_settings(vocab_size)
    with launching_on(logits_nv):
        cross_entropy_kernel[(rows,)](
            logits_nv,
            labels_n,
            losses_n,
            logits_nv.stride(0),
            vocab_size,
            with_gradient=with_gradient,
            block=block,
            num_warps=num_warps,
        )


def _loss_and_gradients(
    x_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor,
    labels_n: Tensor,
    chunk_rows: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss and the three gradients, which are empty without `with_gradients`."""
    rows_in_all, vocab_size = x_nd.shape[0], weight_vd.shape[0]
    labels_n = labels_n.contiguous()
    losses_n = x_nd.new_empty(rows_in_all, dtype=torch.float32)
    logits_nv = x_nd.new_empty(min(chunk_rows, rows_in_all), vocab_size)
    if with_gradients:
        grad_x_nd = torch.empty_like(x_nd, memory_format=torch.contiguous_format)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=torch.float32)
        grad_bias_v = torch.zeros_like(bias_v, dtype=torch.float32)
    else:
        grad_x_nd, grad_weight_vd, grad_bias_v = (x_nd.new_empty(0) for _ in range(3))
    for start in range(0, rows_in_all, chunk_rows):
        rows = slice(start, min(start + chunk_rows, rows_in_all))
        chunk_nv = logits_nv[: rows.stop - start]
        torch.addmm(bias_v, x_nd[rows], weight_vd.t(), out=chunk_nv)
        cross_entropy_(chunk_nv, labels_n[rows], losses_n[rows], with_gradients)
        if with_gradients:
            grad_bias_v += chunk_nv.sum(dim=0, dtype=torch.float32)
            torch.mm(chunk_nv, weight_vd, out=grad_x_nd[rows])
            add_product_(grad_weight_vd, chunk_nv.t(), x_nd[rows])
    return (
        losses_n.sum(),
        grad_x_nd,
        grad_weight_vd.to(weight_vd.dtype),
        grad_bias_v.to(bias_v.dtype),
    )


_operator = torch.library.custom_op(
    "megaphi::linear_cross_entropy", _loss_and_gradients, mutates_args=()
)


@_operator.register_fake
def _fake(
    x_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor,
    labels_n: Tensor,
    chunk_rows: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `_loss_and_gradients`."""
    loss = x_nd.new_empty((), dtype=torch.float32)
    if not with_gradients:
        return loss, x_nd.new_empty(0), weight_vd.new_empty(0), bias_v.new_empty(0)
    return (
        loss,
        torch.empty_like(x_nd, memory_format=torch.contiguous_format),
        torch.empty_like(weight_vd),
        torch.empty_like(bias_v),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the forward pass made; only the loss is differentiable."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the gradients that the forward pass made."""
    if grad_loss is None:
        return (None,) * 6
    # multiplied in fp32, as the reference does: rounding the factor would shift every gradient
    scaled = ((g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors)
    return (*scaled, None, None, None)


_operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator without the dispatcher, for eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor,
        labels_n: Tensor,
        chunk_rows: int,
    ) -> Tensor:
        """Return the summed loss, and keep the three gradients for `backward`."""
        loss, *gradients = _loss_and_gradients(
            x_nd, weight_vd, bias_v, labels_n, chunk_rows, with_gradients=True
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        return _scale_gradients(ctx, grad_loss)[:5]


def linear_cross_entropy(
    x_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor,
    labels_n: Tensor,
    chunk_rows: int | None = None,
) -> Tensor:
    """Head projection and cross-entropy without ever holding all logits.

    Args:
        x_nd: final hidden states.
        weight_vd: head weight, in the dtype of `x_nd`.
        bias_v: head bias, in the dtype of `x_nd`.
        labels_n: integer target ids, each in [0, v); another makes the loss NaN.
        chunk_rows: rows whose logits [chunk_rows, v] exist at a time; when not given,
            `kernels.reference.rows_per_chunk`.

    Returns:
        fp32 scalar, the sum of -log softmax(x W^T + b)[label] over the rows. Gradients of the
        weight add up in fp32 over the chunks.
    """
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(x_nd.device)
    with_gradients = torch.is_grad_enabled() and (
        x_nd.requires_grad or weight_vd.requires_grad or bias_v.requires_grad
    )
    loss: Tensor
    if torch.compiler.is_compiling():
        loss = _operator(x_nd, weight_vd, bias_v, labels_n, chunk_rows, with_gradients)[0]
    elif with_gradients:
        loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_nd, weight_vd, bias_v, labels_n, chunk_rows
        )
    else:
        loss = _loss_and_gradients(x_nd, weight_vd, bias_v, labels_n, chunk_rows, False)[0]
    return loss
