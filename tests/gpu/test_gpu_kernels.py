"""Every Triton kernel on the device itself against float64, forward and backward."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaphi.config import Model
from tests.gpu import formulas
from tests.gpu.device import DEVICE, DRY_RUN, has_fp8, needs_triton, pytestmark  # noqa: F401
from tools.bench.kernels.cases import CASES, Case, Inputs, Sizes, small_sizes
from tools.bench.kernels.command import (
    call,
    operations_with_kernel,
    plain_twin,
    results,
    worst_error,
)

# relative errors in the norm; a gradient in 16 bits is rounded once more than its inputs
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
RAGGED = Sizes(
    batch=2 if DRY_RUN else 3,
    time=5 if DRY_RUN else 37,
    model=Model(num_layers=1, hidden_size=100, num_heads=5, vocab_size=1003),
    optimizer_layers=1,
)
# 4,096 rows of phi-1: more would only make the logits in float64 too large for small cards
PHI = small_sizes(32) if DRY_RUN else Sizes(batch=2, optimizer_layers=1)
EXACT = [case for case in CASES if hasattr(formulas, case.function)]
FP8 = [case for case in CASES if case.function.startswith("fp8_")]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that an element nobody writes shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.ones(1, device=DEVICE).new_empty(7).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def triton_results(case: Case, inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    function = getattr(importlib.import_module(f"kernels.{case.file}"), case.function)
    return results(case, function, inputs.copy(), gradients)


def double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def test_every_operation_is_tested() -> None:
    assert {case.function for case in EXACT + FP8} == operations_with_kernel()


@needs_triton
@pytest.mark.parametrize("sizes", [RAGGED, PHI], ids=["ragged", "phi-1"])
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_equals_float64(case: Case, dtype: torch.dtype, sizes: Sizes) -> None:
    if case.dtype is not None and dtype != case.dtype:
        pytest.skip("fp32 only")
    inputs = case.inputs(sizes, dtype, DEVICE)
    wide = inputs.copy(double)
    outputs = call(case, getattr(formulas, case.function), wide)
    leaves = wide.leaves()
    gradients, exact = [], [output.detach() for output in outputs]
    if leaves:
        gradients = [
            torch.randn_like(o).to(dtype) if o.dim() else torch.ones_like(o) for o in outputs
        ]
        given = [g.double() for g in gradients]
        exact += torch.autograd.grad(outputs, leaves, given)
    first = triton_results(case, inputs, gradients)
    for ours, right in zip(first, exact, strict=True):
        assert ours.shape == right.shape
        assert worst_error([ours.double()], [right]) < LIMITS[dtype]
    second = triton_results(case, inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.skipif(not has_fp8(), reason="needs a GPU of compute capability 8.9 or higher")
@pytest.mark.parametrize("sizes", [RAGGED, PHI], ids=["ragged", "phi-1"])
@pytest.mark.parametrize("case", FP8, ids=lambda case: case.name)
def test_fp8_casts_equal_their_definition(case: Case, sizes: Sizes) -> None:
    inputs = case.inputs(sizes, torch.bfloat16, DEVICE)
    exact = results(case, plain_twin(case), inputs.copy(), [])
    for ours, right in zip(triton_results(case, inputs, []), exact, strict=True):
        assert torch.equal(ours, right)
