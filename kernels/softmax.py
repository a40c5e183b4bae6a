"""Softmax over a row of logits that is longer than a program holds: what the loss kernels share.

    maximum = max(z);  total = sum(exp(z - maximum))
    dz = exp(z - maximum) / total - onehot(target)

`row_statistics` passes over blocks of the row once, with a running maximum and a running sum
(Milakov and Gimelshein, arXiv 1805.02867); `write_row_gradient` passes over it once more and puts
the gradient in the place of the logits. All arithmetic is fp32. The target's entry is subtracted
from in fp32, before its only rounding: subtracting 1 from a rounded probability near 1 would lose
most of its digits.
"""

import triton
import triton.language as tl

BLOCK = 8192
"""Logits a program holds at a time; fewer where the row is shorter."""
NUM_WARPS = 16
"""For a whole block. 39 registers a thread let 3 programs share a multiprocessor: 33 MB of phi-1's
rows in flight on an A100 (40 MB of L2) and 40 MB on an H100 or H200 (50 MB), which the second pass
can find in L2. With 8 warps 4 programs fit, and the rows in flight no longer do."""


def launch_settings(num_columns: int) -> tuple[int, int]:
    """Block and number of warps for rows of so many columns."""
    block = min(BLOCK, triton.next_power_of_2(num_columns))
    return block, min(NUM_WARPS, max(1, block // 512))


@triton.jit
def target_logit(row_ptr, column, num_columns):  # type: ignore[no-untyped-def]
    """Whether int64 `column` is one of the row's; and its logit in fp32, else that of column 0."""
    here = (column >= 0) & (column < num_columns)
    return here, tl.load(row_ptr + tl.where(here, column, 0)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def row_statistics(row_ptr, num_columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum and sum of exp(z - maximum) of the row that begins at `row_ptr`, fp32."""
    lanes = tl.arange(0, block)
    # the lowest finite number, not -inf: a first block of nothing but -inf stays exact
    maximum = -3.4028234663852886e38
    total = 0.0
    for start in range(0, num_columns, block):
        columns = start + lanes
        z = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf"))
        z = z.to(tl.float32)
        larger = tl.maximum(maximum, tl.max(z, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger), axis=0)
        maximum = larger
    return maximum, total


@triton.jit  # type: ignore[untyped-decorator]
def write_row_gradient(row_ptr, column, maximum, total, num_columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Overwrite a row with softmax - onehot, in its dtype; a `column` outside adds no onehot."""
    reciprocal = 1.0 / total
    lanes = tl.arange(0, block)
    for start in range(0, num_columns, block):
        columns = start + lanes
        mask = columns < num_columns
        z = tl.load(row_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - maximum) * reciprocal - tl.where(columns == column, 1.0, 0.0)
        tl.store(row_ptr + columns, gradient.to(row_ptr.dtype.element_ty), mask=mask)
