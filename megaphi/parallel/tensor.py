"""Tensor parallelism with sequence parallelism (Korthikanti et al., arXiv 2205.05198).

Between blocks each process of the tensor axis holds a part of the rows (tokens); inside a block all
rows and a part of the heads and of the MLP's inner width. A block of phi adds attention and MLP to
the residual stream at once, so it needs one all-gather where it begins and one reduce-scatter where
it ends, and the same again in the backward pass: half of what a serial block needs.

Rows are the flattened [b, t], cut into equal contiguous parts, so that gathering them needs no
copy; nothing outside of the attention cares where a sequence begins.

Suffixes: n rows, d hidden width, v this process's part of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from kernels.matmul import add_product_


@dataclass(frozen=True)
class TensorAxis:
    """The tensor axis as the model sees it; of length 1 it does nothing."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

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

    def cut(self, rows_nd: Tensor) -> Tensor:
        """This process's part of rows that every process has; carries no gradient."""
        return rows_nd.chunk(self.size)[self.rank] if self.size > 1 else rows_nd

    def _all_gather(self, part_nd: Tensor) -> Tensor:
        """Rows of all processes, one after the other."""
        rows_nd = part_nd.new_empty(part_nd.shape[0] * self.size, *part_nd.shape[1:])
        dist.all_gather_into_tensor(rows_nd, part_nd.contiguous(), group=self.group)
        return rows_nd

    def _reduce_scatter(self, rows_nd: Tensor) -> Tensor:
        """Sum over processes, of which each keeps its part."""
        part_nd = rows_nd.new_empty(rows_nd.shape[0] // self.size, *rows_nd.shape[1:])
        dist.reduce_scatter_tensor(part_nd, rows_nd.contiguous(), group=self.group)
        return part_nd


ALONE = TensorAxis()
"""The tensor axis of a model that is not cut."""


class _Gather(torch.autograd.Function):
    """All-gather of rows; backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part_nd: Tensor, axis: TensorAxis) -> Tensor:  # type: ignore[override]
        """Rows of all processes."""
        ctx.axis = axis
        return axis._all_gather(part_nd)

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Every process used the rows for its own part of the layer: the gradients add up."""
        return ctx.axis._reduce_scatter(grad_nd), None


class _SumAndCut(torch.autograd.Function):
    """Reduce-scatter of rows; backward all-gather."""

    @staticmethod
    def forward(ctx: Any, partial_nd: Tensor, axis: TensorAxis) -> Tensor:  # type: ignore[override]
        """This process's part of the sum."""
        ctx.axis = axis
        return axis._reduce_scatter(partial_nd)

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Each addend gets the gradient of all rows."""
        return ctx.axis._all_gather(grad_nd), None


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
    def forward(  # type: ignore[override]
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
        chunk_rows = 512 if x_nd.device.type == "cpu" else 4096
        ids_n = labels_n - axis.rank * weight_vd.shape[0]
        for start in range(0, len(x_nd), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_nv = F.linear(x_nd[rows], weight_vd, bias_v).float()
            loss += _loss_to_gradient_(logits_nv, ids_n[rows], axis)
            if with_gradients:
                gradient_nv = logits_nv.to(x_nd.dtype)
                grad_bias_v += logits_nv.sum(dim=0)
                torch.mm(gradient_nv, weight_vd, out=grad_x_nd[rows])
                add_product_(grad_weight_vd, gradient_nv.t(), x_nd[rows])
        ctx.dtypes = (x_nd.dtype, weight_vd.dtype, bias_v.dtype)
        if with_gradients:
            ctx.save_for_backward(grad_x_nd, grad_weight_vd, grad_bias_v)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        gradients = (
            (gradient.float() * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def _loss_to_gradient_(logits_nv: Tensor, ids_n: Tensor, axis: TensorAxis) -> Tensor:
    """Overwrite fp32 logits with softmax - onehot; return the sum of the rows' losses.

    `ids_n` are the targets as rows of this process's part; outside of it the target is another's.
    """
    maximum_n = logits_nv.amax(dim=1)
    dist.all_reduce(maximum_n, dist.ReduceOp.MAX, group=axis.group)
    logits_nv -= maximum_n[:, None]
    here_n = (ids_n >= 0) & (ids_n < logits_nv.shape[1])
    column_n = ids_n.where(here_n, 0)[:, None]
    target_n = logits_nv.gather(1, column_n)[:, 0] * here_n
    logits_nv.exp_()
    sums = torch.stack((logits_nv.sum(dim=1), target_n))
    dist.all_reduce(sums, group=axis.group)
    total_n, target_n = sums
    logits_nv /= total_n[:, None]
    logits_nv.scatter_add_(1, column_n, -here_n[:, None].float())
    loss: Tensor = (total_n.log() - target_n).sum()
    return loss
