"""Cross-entropy over a part of the vocabulary, in Triton: row statistics, then gradients in place.

    m = max(z);  s = sum(exp(z - m));  t = z[target], or -inf where another part has the target
    with M and S of all parts:  dz = exp(z - M) / S - onehot(target)

Between the two, processes exchange m, s and t: 12 bytes a row. One program a row in both: each is
one of the passes of `kernels.softmax`. All arithmetic is fp32.

Bytes, with V x 2 a bf16 row of logits: read, then read and written, 6 a logit. The unfused form
holds the logits in fp32 alongside them and passes over these for the conversion, the maximum, the
exponentials, their sum, the quotient and the conversion back: 44 a logit. There is no fp32 copy:
at tensor parallelism 2 and 4,096 rows a chunk that is 0.42 GB less.
Gain over torch.compile: not measured yet.

Layout: logits rows contiguous; wide loads need V to be a multiple of 16 / itemsize. Limits: fp32,
bf16 or fp16, any number of columns.

Shape suffixes: n rows, v this process's part of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on
from kernels.softmax import launch_settings, row_statistics, target_logit, write_row_gradient


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, statistics_ptr, row_stride, num_columns, block: tl.constexpr
):
    """One row a program; `statistics_ptr` is fp32 [3, programs]."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    column = tl.load(ids_ptr + row).to(tl.int64)
    here, target = target_logit(logits_ptr, column, num_columns)
    maximum, total = row_statistics(logits_ptr, num_columns, block)
    rows = tl.num_programs(0).to(tl.int64)
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + rows + row, total)
    tl.store(statistics_ptr + 2 * rows + row, tl.where(here, target, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, maximum_ptr, total_ptr, row_stride, num_columns, block: tl.constexpr
):
    """One row a program: its dlogits take the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    column = tl.load(ids_ptr + row).to(tl.int64)
    maximum, total = tl.load(maximum_ptr + row), tl.load(total_ptr + row)
    # a target in another part is no column of this one
    write_row_gradient(logits_ptr, column, maximum, total, num_columns, block)


def _statistics(logits_nv: Tensor, ids_n: Tensor) -> Tensor:
    """Return fp32 [3, n]."""
    rows, num_columns = logits_nv.shape
    assert logits_nv.stride(1) == 1
    statistics = logits_nv.new_empty((3, rows), dtype=torch.float32)
    block, num_warps = launch_settings(num_columns)
    if rows:
        with launching_on(logits_nv):
            statistics_kernel[(rows,)](
                logits_nv,
                ids_n.contiguous(),
                statistics,
                logits_nv.stride(0),
                num_columns,
                block,
                num_warps=num_warps,
            )
    return statistics


def _gradient_(logits_nv: Tensor, ids_n: Tensor, maximum_n: Tensor, total_n: Tensor) -> None:
    """Write dlogits over the logits."""
    rows, num_columns = logits_nv.shape
    assert logits_nv.stride(1) == 1
    block, num_warps = launch_settings(num_columns)
    if rows:
        with launching_on(logits_nv):
            gradient_kernel[(rows,)](
                logits_nv,
                ids_n.contiguous(),
                maximum_n.contiguous(),
                total_n.contiguous(),
                logits_nv.stride(0),
                num_columns,
                block,
                num_warps=num_warps,
            )


_statistics_op = torch.library.custom_op(
    "megaphi::vocabulary_statistics", _statistics, mutates_args=()
)
_gradient_op = torch.library.custom_op(
    "megaphi::vocabulary_gradient_", _gradient_, mutates_args=("logits_nv",)
)


@_statistics_op.register_fake
def _(logits_nv: Tensor, ids_n: Tensor) -> Tensor:
    return logits_nv.new_empty((3, logits_nv.shape[0]), dtype=torch.float32)


@_gradient_op.register_fake
def _(logits_nv: Tensor, ids_n: Tensor, maximum_n: Tensor, total_n: Tensor) -> None:
    return None


def vocabulary_statistics(logits_nv: Tensor, ids_n: Tensor) -> Tensor:
    """Maximum, sum of exponentials and target's logit; twin of the one in `reference_vocabulary`.

    Args:
        logits_nv: logits of this part of the vocabulary, contiguous in the last dimension.
        ids_n: int64 targets, counted from this part's first column; outside of [0, v) the target
            is in another part.

    Returns:
        fp32 [3, n].
    """
    if torch.compiler.is_compiling():
        statistics: Tensor = torch.ops.megaphi.vocabulary_statistics(logits_nv, ids_n)
        return statistics
    return _statistics(logits_nv, ids_n)


def vocabulary_gradient_(
    logits_nv: Tensor, ids_n: Tensor, maximum_n: Tensor, total_n: Tensor
) -> None:
    """Overwrite logits with softmax - onehot; twin of the one in `reference_vocabulary`.

    Args:
        logits_nv: logits of this part of the vocabulary, contiguous in the last dimension.
        ids_n: int64 targets as in `vocabulary_statistics`.
        maximum_n: fp32 maximum of the row in all parts.
        total_n: fp32 sum of exp(z - maximum) over all parts; NaN makes the row NaN.
    """
    if torch.compiler.is_compiling():
        torch.ops.megaphi.vocabulary_gradient_(logits_nv, ids_n, maximum_n, total_n)
    else:
        _gradient_(logits_nv, ids_n, maximum_n, total_n)
