"""Where a block begins under tensor parallelism: collectives that run alongside matrix products.

`qkv` and `fc1` read the same rows, of which each process has a part, so that one function for both
needs one all-gather where a pair of layers needs two, and one reduce-scatter of the sum of both
gradients. What runs alongside what, with X the rows of all processes:

    forward   all-gather of X            | products of this process's own rows
    backward  all-gather of X, again     | dX = dY1 W1 + dY2 W2 (the second adds onto the first)
              reduce-scatter of dX       | dW1 = dY1^T X, dW2 = dY2^T X

Between forward and backward a process keeps its part of the rows only, as in Korthikanti et al.
(arXiv 2205.05198, section 4.2.2): n d / size instead of n d elements a block. A block that is
computed again in the backward pass keeps the gathered rows, since they live for a moment only.

Suffixes: n rows, d hidden width, m outputs of a layer on this process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaphi.config import Parallel
from megaphi.model.linear import Linear, as_placed, fp32_weight_gradient, gradient_in_gemm
from megaphi.parallel.tensor import TensorAxis, finished, local


@dataclass(frozen=True)
class Overlap:
    """Whether the collectives of a block's begin run alongside its products, and why."""

    enabled: bool
    reason: str


def choose_overlap(parallel: Parallel, fp8_layers: Sequence[str]) -> Overlap:
    """Decide from the recipe whether blocks begin with `column_pair`.

    Args:
        parallel: the layout.
        fp8_layers: layers of a block that multiply in FP8; none without FP8.
    """
    if parallel.tensor == 1:
        return Overlap(False, "no tensor parallelism")
    fp8 = [name for name in fp8_layers if name in ("qkv", "fc1")]
    if fp8:
        return Overlap(False, f"off, {' and '.join(fp8)} keep their input in FP8 instead")
    if parallel.pipeline > 1 and parallel.pipeline_schedule in ("interleaved-zero-bubble", "zbv"):
        # they ask for the gradients of inputs and of weights one after the other: everything twice
        return Overlap(False, f"off, {parallel.pipeline_schedule} splits the backward pass")
    return Overlap(True, "all-gather and reduce-scatter alongside the products of qkv and fc1")


class BlockInput:
    """The rows that a block reads, as its two column-parallel layers see them.

    Without overlap each layer runs when its output is asked for: a block asks for `fc1` after its
    attention, so that in the backward pass the large gradient of `fc1` is gone before that.

    Args:
        part_nd: this process's rows.
        qkv: layer whose output has its bias.
        fc1: layer whose bias is added later.
        axis: the tensor axis.
        keep_rows: as in `column_pair`.
    """

    def __init__(
        self, part_nd: Tensor, qkv: Linear, fc1: Linear, axis: TensorAxis, *, keep_rows: bool
    ) -> None:
        self._layers = qkv, fc1
        self._outputs: tuple[Tensor, Tensor] | None = None
        if axis.overlaps:
            self._outputs = column_pair(part_nd, qkv, fc1, axis, keep_rows=keep_rows)
        else:
            self._rows_nd = axis.gather(part_nd)

    def qkv(self) -> Tensor:
        """The packed projection of all rows, for this process's heads."""
        return self._layers[0](self._rows_nd) if self._outputs is None else self._outputs[0]

    def fc1(self) -> Tensor:
        """This process's part of the MLP's inner width for all rows, without the bias."""
        return self._layers[1].product(self._rows_nd) if self._outputs is None else self._outputs[1]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def column_pair(
    part_nd: Tensor, first: nn.Linear, second: nn.Linear, axis: TensorAxis, *, keep_rows: bool
) -> tuple[Tensor, Tensor]:
    """Both layers on the rows of all processes; the first with its bias, the second without.

    torch.compile ends a graph before this and begins the next one after it.

    Args:
        part_nd: this process's rows.
        first: layer whose outputs are cut over the axis.
        second: likewise.
        axis: the tensor axis, longer than 1.
        keep_rows: whether the backward pass finds the gathered rows, or gathers them again.

    Returns:
        This process's outputs, [n x size, m] each.
    """
    bias_m = local(first.bias)
    outputs: tuple[Tensor, Tensor] = _ColumnPair.apply(  # type: ignore[no-untyped-call]
        part_nd, first.weight, bias_m, second.weight, axis, keep_rows
    )
    return outputs


class _ColumnPair(torch.autograd.Function):
    """The two layers, whose weights are parameters: DTensors, of which each has a part."""

    @staticmethod
    def forward(
        ctx: Any,
        part_nd: Tensor,
        first_weight: Tensor,
        first_bias: Tensor,
        second_weight: Tensor,
        axis: TensorAxis,
        keep_rows: bool,
    ) -> tuple[Tensor, Tensor]:
        """Multiply this process's own rows while those of the others arrive."""
        gathering = axis.start_gather(part_nd)
        num_part = len(part_nd)
        weights_dm = [local(weight).t() for weight in (first_weight, second_weight)]
        outputs = [part_nd.new_empty(num_part * axis.size, w.shape[1]) for w in weights_dm]

        def multiply(rows_nd: Tensor, rows: slice) -> None:
            torch.addmm(first_bias, rows_nd, weights_dm[0], out=outputs[0][rows])
            torch.mm(rows_nd, weights_dm[1], out=outputs[1][rows])

        begin, end = axis.rank * num_part, (axis.rank + 1) * num_part
        multiply(part_nd, slice(begin, end))
        rows_nd = finished(gathering)
        for rows in (slice(0, begin), slice(end, len(rows_nd))):
            if rows.stop > rows.start:
                multiply(rows_nd[rows], rows)
        ctx.axis, ctx.keep_rows = axis, keep_rows
        ctx.save_for_backward(rows_nd if keep_rows else part_nd, first_weight, second_weight)
        return outputs[0], outputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, first_nm: Tensor, second_nm: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the part of the rows, both weights and the bias; see the top of the file."""
        kept_nd, *weights = ctx.saved_tensors
        rows_nd = kept_nd if ctx.keep_rows else ctx.axis.start_gather(kept_nd)
        grad_nd = first_nm @ local(weights[0])
        grad_nd.addmm_(second_nm, local(weights[1]))
        scattering = ctx.axis.start_sum_and_cut(grad_nd)
        if not ctx.keep_rows:
            rows_nd = finished(rows_nd)
        first, second = (
            _weight_gradient(weight, grad_nm, rows_nd)
            for weight, grad_nm in zip(weights, (first_nm, second_nm), strict=True)
        )
        bias_m = first_nm.sum(dim=0, dtype=torch.float32)
        return finished(scattering), first, bias_m, second, None, None


def _weight_gradient(weight: Tensor, grad_nm: Tensor, x_nd: Tensor) -> Tensor | None:
    """Gradient of a weight, or None where it was added up in place."""
    if gradient_in_gemm(x_nd, weight):
        return fp32_weight_gradient(weight, grad_nm, x_nd)
    return as_placed(grad_nm.t() @ x_nd, weight)
