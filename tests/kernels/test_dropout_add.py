"""The kernels of both branches' dropout and sum against float64, and what they need on a GPU.

The numerics run in a child process with Triton's interpreter, since it and the compiler cannot
share a process. Nothing here imports the kernels at the top: they are for that child only.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreting
from kernels.reference import DropoutSeed, dropout_masks
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

CPU = torch.device("cpu")
PLACE = DropoutSeed(seed=5, step=1, first_token=40)
SCATTERED = torch.tensor([3, 0, 2**31, 17, 4, 5, 2**33 + 1])
THRESHOLD = 6554  # of probability 0.1
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DropoutAdd = Callable[..., Tensor]


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random inputs in the order of the function's arguments."""
    shapes = [shape, shape[-1:], shape, shape[-1:]]
    return [torch.randn(size).to(dtype).requires_grad_() for size in shapes]


def exact_dropout_add(
    values: list[Tensor], probability: float, site: int
) -> tuple[list[Tensor], Tensor]:
    """The formula in float64; returns its inputs and its result."""
    inputs = [value.detach().double().requires_grad_() for value in values]
    attention, bias_a, mlp, bias_b = inputs
    rows = attention.flatten(0, -2).shape
    masks = dropout_masks(rows, probability, PLACE, site, CPU)
    mask_a, mask_b = (mask.double().view_as(attention) for mask in masks)
    return inputs, mask_a * (attention + bias_a) + mask_b * (mlp + bias_b)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values."""
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
class TestNumerics:
    @pytest.fixture(autouse=True)
    def poisoned(self) -> Iterator[None]:
        """New memory is full of NaN, so that an element nobody writes shows."""
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        assert bool(torch.ones(1).new_empty(7).isnan().all())
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.fixture
    def dropout_add(self) -> DropoutAdd:
        function: DropoutAdd = importlib.import_module("kernels.dropout_add").bias_dropout_add
        return function

    @pytest.mark.parametrize("probability", [0.0, 0.3])
    @pytest.mark.parametrize("shape", [(1, 8), (5, 12), (37, 100), (2, 3, 20), (4, 6), (6, 2048)])
    def test_equals_float64(
        self, dropout_add: DropoutAdd, shape: tuple[int, ...], probability: float
    ) -> None:
        values = leaves(shape)
        exact, z64 = exact_dropout_add(values, probability, site=2)
        z = dropout_add(*values, probability, PLACE, site=2)
        torch.testing.assert_close(z.double(), z64, rtol=1e-6, atol=1e-6)
        upstream = torch.randn(shape)
        ours = torch.autograd.grad(z, values, upstream)
        expected = torch.autograd.grad(z64, exact, upstream.double())
        for gradient, gradient64 in zip(ours, expected, strict=True):
            torch.testing.assert_close(gradient.double(), gradient64, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("probability", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, dropout_add: DropoutAdd, dtype: torch.dtype, probability: float) -> None:
        values = leaves((11, 72), dtype)
        exact, z64 = exact_dropout_add(values, probability, site=0)
        z = dropout_add(*values, probability, PLACE)
        assert z.dtype == dtype
        assert relative_error(z, z64) < 5e-3
        upstream = torch.randn(11, 72).to(dtype)
        ours = torch.autograd.grad(z, values, upstream)
        expected = torch.autograd.grad(z64, exact, upstream.double())
        for gradient, gradient64 in zip(ours, expected, strict=True):
            assert gradient.dtype == dtype
            assert relative_error(gradient, gradient64) < 5e-3

    @pytest.mark.parametrize("width", [4, 12, 6, 80])
    @pytest.mark.parametrize(
        ("place", "site"),
        [
            (PLACE, 0),
            (DropoutSeed(seed=5, step=2, first_token=40), 46),
            (DropoutSeed(seed=2**63 + 11, step=2**31 + 9, first_token=2**33 + 16), 3),
            (DropoutSeed(seed=5, step=1, first_token=40, tokens_n=SCATTERED), 2),
        ],
    )
    def test_masks_are_the_references(
        self, dropout_add: DropoutAdd, width: int, place: DropoutSeed, site: int
    ) -> None:
        """Forward: a branch of ones beside one of zeros. Backward: the gradients of ones."""
        expected = dropout_masks(torch.Size((7, width)), 0.4, place, site, CPU)
        ones, zeros, none = torch.ones(7, width), torch.zeros(7, width), torch.zeros(width)
        for branches, mask in zip(((ones, zeros), (zeros, ones)), expected, strict=True):
            first, second = (branch.clone().requires_grad_() for branch in branches)
            z = dropout_add(first, none, second, none, 0.4, place, site)
            assert torch.equal(z, mask)
            z.backward(ones)
            assert torch.equal(first.grad, expected[0])
            assert torch.equal(second.grad, expected[1])

    def test_gradients_do_not_share_memory(self, dropout_add: DropoutAdd) -> None:
        """Without dropout one tensor serves both branches; writing to one leaf must not show."""
        values = leaves((5, 12))
        dropout_add(*values).backward(torch.randn(5, 12))
        for index, value in enumerate(values):
            value.grad.fill_(float(index))
        for index, value in enumerate(values):
            assert bool((value.grad == index).all())

    def test_no_dropout_without_a_place(self, dropout_add: DropoutAdd) -> None:
        values = leaves((5, 12))
        expected = dropout_add(*values)
        for probability, place in ((0.5, None), (0.0, PLACE), (1e-6, PLACE)):
            assert torch.equal(dropout_add(*values, probability, place), expected)

    def test_strided_inputs(self, dropout_add: DropoutAdd) -> None:
        """Slices of a wider tensor and an expanded gradient."""
        values = [value.detach() for value in leaves((3, 5, 12))]
        for index in (0, 2):
            values[index] = torch.randn(3, 5, 20)[..., 4:16]
        results = []
        for copy in (False, True):
            inputs = [(v.contiguous() if copy else v).detach().requires_grad_() for v in values]
            z = dropout_add(*inputs, 0.2, PLACE)
            results.append((z, *torch.autograd.grad(z.sum(), inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_refuses_what_it_cannot_take(self, dropout_add: DropoutAdd) -> None:
        with pytest.raises(ValueError, match=r"width 8193: .* 1 to 8192"):
            dropout_add(*leaves((1, 8193)))
        for probability in (-0.1, 1.0):
            with pytest.raises(ValueError, match="probability"):
                dropout_add(*leaves((2, 8)), probability, PLACE)
        values = leaves((2, 8))
        with pytest.raises(ValueError, match=r"must be torch.bfloat16 of shape \(2, 8\)"):
            dropout_add(values[0].bfloat16(), *values[1:])

    @pytest.mark.parametrize("threshold", [0, THRESHOLD])
    def test_operators(self, dropout_add: DropoutAdd, threshold: int) -> None:
        """Schema, fake tensors and autograd of the registered operators."""
        tokens_n = torch.randperm(6) if threshold else None
        dropout, operators = ([-5, 1, 2, 40], tokens_n, threshold), torch.ops.megaphi
        torch.library.opcheck(operators.bias_dropout_add.default, (*leaves((3, 2, 8)), *dropout))
        if threshold:
            torch.library.opcheck(
                operators.bias_dropout_add_backward.default, (torch.randn(3, 2, 8), *dropout)
            )

    @pytest.mark.parametrize("probability", [0.0, 0.3])
    def test_compiled_equals_eager(self, dropout_add: DropoutAdd, probability: float) -> None:
        """Over steps with different masks."""
        values, upstream = leaves((5, 12)), torch.randn(5, 12)

        def function(values: list[Tensor], place: DropoutSeed) -> Tensor:
            return dropout_add(*values, probability, place, site=4)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for step in (3, 4, 5):
            place = DropoutSeed(seed=5, step=step, first_token=7 * step)
            results = []
            for call in (function, compiled):
                z = call(values, place)
                results.append((z, *torch.autograd.grad(z, values, upstream)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@with_triton
def test_numerics_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter([f"{__file__}::TestNumerics"], at_least=40)


PLACE_ARGUMENTS = {
    **dict.fromkeys(("seed", "step", "site", "first_token"), "i64"),
    "tokens_ptr": "*i64",
    **dict.fromkeys(("threshold", "width", "block"), "constexpr"),
}
FORWARD = {
    **{f"{name}_ptr": "*bf16" for name in ("attention", "attention_bias", "mlp", "mlp_bias", "z")},
    **dict.fromkeys(("attention_stride", "mlp_stride"), "i32"),
    **PLACE_ARGUMENTS,
}
BACKWARD = {
    **{f"{name}_ptr": "*bf16" for name in ("dz", "dattention", "dmlp")},
    "partial_ptr": "*fp32",
    **dict.fromkeys(("dz_stride", "num_rows", "rows_per_program"), "i32"),
    **PLACE_ARGUMENTS,
}


@with_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize(
    ("kernel", "threshold", "registers", "loads"),
    [
        ("forward_kernel", THRESHOLD, 56, 4),
        ("forward_kernel", 0, 40, 4),
        ("backward_kernel", THRESHOLD, 64, 1),
    ],
)
def test_resources_at_phi_1(
    capability: int, kernel: str, threshold: int, registers: int, loads: int
) -> None:
    """Width 2048 in bf16: 16-byte loads, no spills."""
    needed = resources(
        "kernels.dropout_add",
        kernel,
        FORWARD if kernel == "forward_kernel" else BACKWARD,
        {"threshold": threshold, "width": 2048, "block": 2048},
        capability=capability,
        num_warps=8,
    )
    assert needed.registers <= registers
    assert needed.spill_bytes == 0
    assert needed.shared_bytes <= 8192
    assert needed.vector_loads == loads
