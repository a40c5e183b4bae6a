"""Tensor parallelism with sequence parallelism (Korthikanti et al., arXiv 2205.05198).

Between blocks each process of the tensor axis holds a part of the rows (tokens); inside a block all
rows and a part of the heads and of the MLP's inner width. A block of phi adds attention and MLP to
the residual stream at once, so it needs one all-gather where it begins and one reduce-scatter where
it ends, and the same again in the backward pass: half of what a serial block needs. Which of them
run alongside matrix products is in `megaphi.model.column_pair`.

Rows are the flattened [b, t], cut into equal contiguous parts, so that gathering them needs no
copy; nothing outside of the attention cares where a sequence begins.

Suffixes: n rows, d hidden width, v this process's part of the vocabulary, r processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from kernels import ops
from kernels.matmul import add_product_
from kernels.reference import rows_per_chunk


@dataclass(frozen=True)
class TensorAxis:
    """The tensor axis as the model sees it; of length 1 it does nothing."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    overlaps: bool = False
    """Whether blocks begin with `megaphi.model.column_pair.column_pair`."""

    def gather(self, part_nd: Tensor) -> Tensor:
        """The rows of all processes, [n x size, d]; their gradients are added up and cut."""
        if self.size == 1:
            return part_nd
        rows_nd: Tensor = _Gather.apply(part_nd, self)  # type: ignore[no-untyped-call]
        return rows_nd

    def sum_and_cut(self, partial_nd: Tensor) -> Tensor:
        """This process's part of the sum over processes, [n / size, d]."""
        if self.size == 1:
            return partial_nd
        part_nd: Tensor = _SumAndCut.apply(partial_nd, self)  # type: ignore[no-untyped-call]
        return part_nd

    def start_gather(self, part_nd: Tensor) -> Tensor:
        """Begin to collect the rows of all processes, one after the other; `finished` has them."""
        assert self.group is not None
        rows_nd: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(
            part_nd.contiguous(), self.size, self.group.group_name
        )
        return rows_nd

    def start_sum_and_cut(self, rows_nd: Tensor) -> Tensor:
        """Begin to add up rows over processes, of which each keeps its part in `finished`."""
        assert self.group is not None
        part_nd: Tensor = torch.ops._c10d_functional.reduce_scatter_tensor(
            rows_nd.contiguous(), "sum", self.size, self.group.group_name
        )
        return part_nd


def finished(started: Tensor) -> Tensor:
    """The result of a collective that was started; on a GPU the stream waits, not the host."""
    result: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return result


class _Gather(torch.autograd.Function):
    """All-gather of rows; backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part_nd: Tensor, axis: TensorAxis) -> Tensor:
        """Rows of all processes."""
        ctx.axis = axis
        return finished(axis.start_gather(part_nd))

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor, None]:
        """Every process used the rows for its own part of the layer: the gradients add up."""
        return finished(ctx.axis.start_sum_and_cut(grad_nd)), None


class _SumAndCut(torch.autograd.Function):
    """Reduce-scatter of rows; backward all-gather."""

    @staticmethod
    def forward(ctx: Any, partial_nd: Tensor, axis: TensorAxis) -> Tensor:
        """This process's part of the sum."""
        ctx.axis = axis
        return finished(axis.start_sum_and_cut(partial_nd))

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor, None]:
        """Each addend gets the gradient of all rows."""
        return finished(ctx.axis.start_gather(grad_nd)), None


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, for use in the forward pass.

    A parameter that every process has whole is used by each on its own rows only, so its gradient
    is a partial sum; FSDP2 adds these up over the tensor axis with the last micro-batch.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if all(placement.is_replicate() for placement in parameter.placements):
        whole: Tensor = parameter.to_local(grad_placements=[Partial()])
        return whole
    part: Tensor = parameter.to_local()
    return part


def embed(tokens_n: Tensor, weight_vd: Tensor, axis: TensorAxis) -> Tensor:
    """Embedding of this process's part of the rows; each process has a part of the vocabulary."""
    if axis.size == 1:
        return F.embedding(tokens_n, weight_vd)
    ids_n = tokens_n - axis.rank * weight_vd.shape[0]
    foreign_n = (ids_n < 0) | (ids_n >= weight_vd.shape[0])
    partial_nd = F.embedding(ids_n.masked_fill(foreign_n, 0), weight_vd)
    return axis.sum_and_cut(partial_nd.masked_fill(foreign_n[:, None], 0.0))


def head_loss(
    part_nd: Tensor, weight_vd: Tensor, bias_v: Tensor, labels_n: Tensor, axis: TensorAxis
) -> Tensor:
    """Head and loss for this process's part of the rows; labels are those of all rows."""
    if axis.size == 1:
        return ops.linear_cross_entropy(part_nd, weight_vd, bias_v, labels_n)
    return linear_cross_entropy(axis.gather(part_nd), weight_vd, bias_v, labels_n, axis)


def linear_cross_entropy(
    x_nd: Tensor, weight_vd: Tensor, bias_v: Tensor, labels_n: Tensor, axis: TensorAxis
) -> Tensor:
    """Head and loss with the vocabulary cut over the axis; twin of the operation in `kernels`.

    Args:
        x_nd: final hidden states of all rows, equal on every process.
        weight_vd: this process's rows of the head.
        bias_v: their biases.
        labels_n: int64 target ids.
        axis: the tensor axis, longer than 1.

    Returns:
        fp32 scalar, the sum over the rows, equal on every process. The gradient of `x_nd` is this
        process's addend.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_nd, weight_vd, bias_v, labels_n, axis
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunks of rows, whose logits exist one chunk at a time and become their own gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor,
        labels_n: Tensor,
        axis: TensorAxis,
    ) -> Tensor:
        """Loss, and the gradients for a loss gradient of 1."""
        with_gradients = any(ctx.needs_input_grad[:3])
        loss = x_nd.new_zeros((), dtype=torch.float32)
        grad_x_nd = torch.empty_like(x_nd)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=torch.float32)
        grad_bias_v = torch.zeros_like(bias_v, dtype=torch.float32)
        chunk_rows = rows_per_chunk(x_nd.device)
        ids_n = labels_n - axis.rank * weight_vd.shape[0]
        buffer_nv = x_nd.new_empty(min(chunk_rows, len(x_nd)), len(weight_vd))
        for start in range(0, len(x_nd), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_nv = buffer_nv[: len(x_nd[rows])]
            torch.addmm(bias_v, x_nd[rows], weight_vd.t(), out=logits_nv)
            maximum_n, total_n, losses_n = _softmax(logits_nv, ids_n[rows], axis)
            loss += losses_n.sum()
            if with_gradients:
                ops.vocabulary_gradient_(logits_nv, ids_n[rows], maximum_n, total_n)
                grad_bias_v += logits_nv.sum(dim=0, dtype=torch.float32)
                torch.mm(logits_nv, weight_vd, out=grad_x_nd[rows])
                add_product_(grad_weight_vd, logits_nv.t(), x_nd[rows])
        ctx.dtypes = (x_nd.dtype, weight_vd.dtype, bias_v.dtype)
        if with_gradients:
            ctx.save_for_backward(grad_x_nd, grad_weight_vd, grad_bias_v)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        gradients = (
            (gradient.float() * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def _softmax(logits_nv: Tensor, ids_n: Tensor, axis: TensorAxis) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and sum of exponentials of rows over the whole vocabulary, and the rows' losses.

    `ids_n` are the targets as rows of this process's part; outside of it the target is another's.
    A target outside of the vocabulary makes its row NaN, as on one process.
    """
    mine = ops.vocabulary_statistics(logits_nv, ids_n)
    maximum_rn, total_rn, target_rn = (
        finished(axis.start_gather(mine[None])).transpose(0, 1).unbind()
    )
    maximum_n, target_n = maximum_rn.amax(dim=0), target_rn.amax(dim=0)
    total_n = (total_rn * (maximum_rn - maximum_n).exp()).sum(dim=0)
    total_n = total_n.masked_fill(target_n == float("-inf"), float("nan"))
    # in this order: next to a large maximum the logarithm would lose its digits
    return maximum_n, total_n, (maximum_n - target_n) + total_n.log()
