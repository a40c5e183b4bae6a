"""AdamW and the squared gradient norm over a list of tensors, each in one launch.

    m = b1 m + (1 - b1) s g;  v = b2 v + (1 - b2) (s g)^2
    p = p - lr (wd p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

with the clip factor s, the count t and the decision to update at all on the device. The tensors are
cut into blocks of BLOCK elements, one program each. Tables on the device hold the address of every
tensor, its size, its first block, and the tensor of each block; a program finds its block there.
The address tables depend on nothing but the addresses, the block tables on nothing but the sizes,
so both are kept (a bounded number of them) under those and can never be stale. Only lists not seen
before cause a transfer, from pinned memory and without a synchronisation, on the stream of that
call. Inside a CUDA graph capture such a transfer is refused: run once before with the same lists.

Bytes a parameter: reads p, g, m, v and writes p, m, v = 28, against 104 for the same update as
separate passes over the lists with a scaled copy of the gradients; clipping costs nothing. The sum
of squares reads 4, and writes 4 a block. Gain over torch.compile: not measured yet.

A step that does not count leaves the kernel before anything is loaded: NaN gradients touch nothing.
The sum of squares adds up blocks, then PyTorch adds up the blocks' sums: always in the same order.

Layout: fp32, contiguous, one device. Loads are 16 bytes wide where every address of the lists is a
multiple of 16 (allocations are, slices of them need not be: those take the narrow variant), and
only the last block of a tensor is masked. Sizes are free, 0 included; addressing is 64-bit. Limits:
at most 2^31 - 1 blocks (4.4e12 elements) a list; no bf16 copies of the parameters are written.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launching_on

BLOCK = 2048
"""Elements a program handles: two 16-byte loads of each tensor a thread, 40 registers."""
NUM_WARPS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Blocks:
    """How tensors of certain sizes are cut into blocks; all on the device but `count`."""

    owner: Tensor
    """int32 [count], index of the tensor that a block is part of."""
    first: Tensor
    """int64 [tensors], first block of each tensor."""
    sizes: Tensor
    """int64 [tensors], elements of each tensor."""
    count: int


@dataclass(frozen=True)
class Addresses:
    """Where the tensors of a list begin."""

    table: Tensor
    """int64 [tensors], on the device."""
    aligned: bool
    """Whether every address is a multiple of 16."""


class Cache:
    """The values made for the last `capacity` keys."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The value of `key`, made if it is not there; drops the one not used for longest."""
        if key not in self.values:
            self.values[key] = make()
            if len(self.values) > self.capacity:
                self.values.popitem(last=False)
        self.values.move_to_end(key)
        value: T = self.values[key]
        return value


_blocks = Cache(16)
# Gradients may lie elsewhere in every step, so old tables are pushed out: 8 bytes a tensor each.
_addresses = Cache(64)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table from the host without waiting for the device."""
    if device.type != "cuda":
        return table.to(device)
    assert not torch.cuda.is_current_stream_capturing(), "a new list of tensors in a CUDA graph"
    return table.pin_memory().to(device, non_blocking=True)


def make_blocks(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    """Cut tensors of these sizes into blocks."""
    sizes_t = torch.tensor(sizes, dtype=torch.int64)
    counts = (sizes_t + BLOCK - 1) // BLOCK
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    assert owner.numel() < 2**31
    return Blocks(
        owner=_to_device(owner, device),
        first=_to_device(counts.cumsum(0) - counts, device),
        sizes=_to_device(sizes_t, device),
        count=owner.numel(),
    )


def blocks_of(tensors: list[Tensor]) -> Blocks:
    """Block tables for tensors of these sizes."""
    device = tensors[0].device
    sizes = tuple(tensor.numel() for tensor in tensors)
    return _blocks.get((device, sizes), lambda: make_blocks(sizes, device))


def addresses_of(tensors: list[Tensor]) -> Addresses:
    """Address table of these tensors.

    Raises:
        ValueError: a tensor is not fp32, not contiguous, or not on the device of the first one.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                "tensors must be contiguous float32 on one device; one is "
                f"{tensor.dtype} with strides {tensor.stride()} on {tensor.device}"
            )
    pointers = tuple(tensor.data_ptr() for tensor in tensors)
    return _addresses.get(
        (device, pointers),
        lambda: Addresses(
            table=_to_device(torch.tensor(pointers, dtype=torch.int64), device),
            aligned=all(pointer % 16 == 0 for pointer in pointers),
        ),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _block_pointer(table_ptr, tensor, start, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointer to element `start` of a tensor in an address table."""
    pointer = tl.load(table_ptr + tensor).to(tl.pointer_type(tl.float32))
    if aligned:
        # start is a multiple of block, so this holds after the addition too
        return tl.multiple_of(pointer + start, 16)
    return pointer + start


@triton.jit
def _update(p_ptr, g_ptr, m_ptr, v_ptr, mask, factors):  # type: ignore[no-untyped-def]
    """One AdamW update of the elements at these pointers; a mask of None takes all of them."""
    scale, rate, root_correction, decay_rate, beta1, beta2, rest1, rest2, epsilon = factors
    g = tl.load(g_ptr, mask=mask) * scale
    m = beta1 * tl.load(m_ptr, mask=mask) + rest1 * g
    v = beta2 * tl.load(v_ptr, mask=mask) + rest2 * g * g
    p = tl.load(p_ptr, mask=mask)
    p -= decay_rate * p + rate * (m / (tl.sqrt(v) * root_correction + epsilon))
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    tl.store(p_ptr, p, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def adamw_kernel(  # type: ignore[no-untyped-def]
    owner_table_ptr,
    first_table_ptr,
    size_table_ptr,
    parameter_table_ptr,
    gradient_table_ptr,
    first_moment_table_ptr,
    second_moment_table_ptr,
    finite_ptr,
    gradient_scale_ptr,
    corrections_ptr,
    learning_rate,
    decay_rate,
    beta1,
    beta2,
    rest1,
    rest2,
    epsilon,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Update of one block of one tensor; `rest1` and `rest2` are 1 - beta."""
    if tl.load(finite_ptr) != 0:
        program = tl.program_id(0)
        tensor = tl.load(owner_table_ptr + program)
        start = (program - tl.load(first_table_ptr + tensor)) * block  # int64, as the table
        remaining = tl.load(size_table_ptr + tensor) - start
        lanes = tl.arange(0, block)
        p_ptr = _block_pointer(parameter_table_ptr, tensor, start, aligned) + lanes
        g_ptr = _block_pointer(gradient_table_ptr, tensor, start, aligned) + lanes
        m_ptr = _block_pointer(first_moment_table_ptr, tensor, start, aligned) + lanes
        v_ptr = _block_pointer(second_moment_table_ptr, tensor, start, aligned) + lanes
        scale = tl.load(gradient_scale_ptr)
        rate = learning_rate / tl.load(corrections_ptr)
        root_correction = 1.0 / tl.sqrt(tl.load(corrections_ptr + 1))
        factors = (
            scale, rate, root_correction, decay_rate, beta1, beta2, rest1, rest2, epsilon
        )  # fmt: skip
        # Without a mask the accesses of a whole block can be wide: sizes are not multiples of 4.
        if remaining >= block:
            _update(p_ptr, g_ptr, m_ptr, v_ptr, None, factors)
        else:
            _update(p_ptr, g_ptr, m_ptr, v_ptr, lanes < remaining, factors)


@triton.jit  # type: ignore[untyped-decorator]
def sum_of_squares_kernel(  # type: ignore[no-untyped-def]
    owner_table_ptr,
    first_table_ptr,
    size_table_ptr,
    address_table_ptr,
    partial_sums_ptr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Sum of squares of one block of one tensor."""
    program = tl.program_id(0)
    tensor = tl.load(owner_table_ptr + program)
    start = (program - tl.load(first_table_ptr + tensor)) * block
    remaining = tl.load(size_table_ptr + tensor) - start
    pointer = _block_pointer(address_table_ptr, tensor, start, aligned)
    lanes = tl.arange(0, block)
    if remaining >= block:
        x = tl.load(pointer + lanes)
    else:
        x = tl.load(pointer + lanes, mask=lanes < remaining, other=0.0)
    tl.store(partial_sums_ptr + program, tl.sum(x * x, axis=0))


def _bias_corrections(step: Tensor, beta1: float, beta2: float) -> Tensor:
    """fp32 [2]: 1 - beta^t of both moments.

    1 - 0.999^1 keeps only four digits when made in fp32; expm1 in float64 keeps all.
    """
    count = step.double()
    logarithms = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    return torch.stack([-torch.expm1(count * logarithm) for logarithm in logarithms]).float()


def _step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step: Tensor,
    finite: Tensor,
    gradient_scale: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """`adamw_step_` without keyword-only arguments, which operators cannot have."""
    if not parameters:
        return
    lists = (parameters, [g.contiguous() for g in gradients], first_moments, second_moments)
    sizes = [[tensor.numel() for tensor in tensors] for tensors in lists]
    if any(sizes[0] != other for other in sizes[1:]):
        raise ValueError("parameters, gradients and moments must have the same sizes")
    tables = [addresses_of(tensors) for tensors in lists]
    blocks = blocks_of(parameters)
    if blocks.count == 0:
        return
    with launching_on(parameters[0]):
        adamw_kernel[(blocks.count,)](
            blocks.owner,
            blocks.first,
            blocks.sizes,
            *(addresses.table for addresses in tables),
            finite.view(torch.uint8),
            gradient_scale.float(),
            _bias_corrections(step, beta1, beta2),
            learning_rate,
            learning_rate * weight_decay,
            beta1,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            epsilon,
            aligned=all(addresses.aligned for addresses in tables),
            block=BLOCK,
            num_warps=NUM_WARPS,
        )


_step_operator = torch.library.custom_op(
    "megaphi::adamw_step_",
    _step,
    mutates_args=("parameters", "first_moments", "second_moments"),
)


@_step_operator.register_fake
def _fake_step(*_: Any) -> None:
    """Nothing is returned, and shapes do not change."""


def adamw_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step: Tensor,
    finite: Tensor,
    gradient_scale: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place (arXiv 1711.05101), without the host looking at any value.

    Args:
        parameters: fp32 parameters, contiguous, on one device.
        gradients: fp32 gradients; not changed.
        first_moments: fp32 m.
        second_moments: fp32 v.
        step: fp32 scalar t, already counting this update.
        finite: bool scalar; where False nothing changes.
        gradient_scale: fp32 scalar that multiplies the gradients (clipping).
        learning_rate: lr.
        beta1: b1.
        beta2: b2.
        epsilon: eps.
        weight_decay: wd.

    Raises:
        ValueError: the lists do not fit each other or the layout above.
    """
    run = _step_operator if torch.compiler.is_compiling() else _step
    with torch.no_grad():
        run(
            parameters,
            gradients,
            first_moments,
            second_moments,
            step,
            finite,
            gradient_scale,
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
        )
    if not torch.compiler.is_compiling() and parameters:
        # autograd cannot see what a kernel writes; the operator tells it by itself
        torch.autograd.graph.increment_version(parameters)


def _squares(tensors: list[Tensor]) -> Tensor:
    """Body of `sum_of_squares`."""
    if not tensors:
        raise ValueError("the sum of squares of no tensors has no device")
    tensors = [tensor.contiguous() for tensor in tensors]
    addresses, blocks = addresses_of(tensors), blocks_of(tensors)
    partial_sums = torch.empty(blocks.count, dtype=torch.float32, device=tensors[0].device)
    if blocks.count > 0:
        with launching_on(partial_sums):
            sum_of_squares_kernel[(blocks.count,)](
                blocks.owner,
                blocks.first,
                blocks.sizes,
                addresses.table,
                partial_sums,
                aligned=addresses.aligned,
                block=BLOCK,
                num_warps=NUM_WARPS,
            )
    return partial_sums.sum()


_squares_operator = torch.library.custom_op("megaphi::sum_of_squares", _squares, mutates_args=())


@_squares_operator.register_fake
def _fake_squares(tensors: list[Tensor]) -> Tensor:
    """An fp32 scalar."""
    return tensors[0].new_empty((), dtype=torch.float32)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """fp32 scalar: the sum of squares over all elements of all tensors; no gradient flows.

    Args:
        tensors: fp32 tensors on one device, at least one, any shapes.
    """
    run = _squares_operator if torch.compiler.is_compiling() else _squares
    with torch.no_grad():
        total: Tensor = run(tensors)
    return total
