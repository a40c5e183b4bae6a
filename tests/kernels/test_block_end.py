"""The block end's Triton kernels against float64, and what they need on a GPU.

The numerics run in a child process with Triton's interpreter, since it and the compiler cannot
share a process. Nothing here imports the kernels at the top: they are for that child only.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from kernels.dispatch import interpreting
from kernels.reference import DropoutSeed, dropout_masks
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

CPU = torch.device("cpu")
EPSILON = 1e-5
PLACE = DropoutSeed(seed=5, step=1, first_token=40)
SCATTERED = torch.tensor([3, 0, 2**31, 17, 4, 5, 2**33 + 1])
THRESHOLD = 6554  # of probability 0.1
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
BlockEnd = Callable[..., tuple[Tensor, Tensor]]


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random inputs in the order of the function's arguments."""
    vector = shape[-1:]
    shapes = [shape, vector, shape, vector, shape, vector, vector]
    return [torch.randn(size).to(dtype).requires_grad_() for size in shapes]


def exact_block_end(
    values: list[Tensor], probability: float, site: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The formula in float64; returns its inputs, y and r."""
    inputs = [value.detach().double().requires_grad_() for value in values]
    attention, bias_a, mlp, bias_b, residual, weight, bias = inputs
    rows = residual.flatten(0, -2).shape
    masks = dropout_masks(rows, probability, PLACE, site, CPU)
    mask_a, mask_b = (mask.double().view_as(residual) for mask in masks)
    r = residual + mask_a * (attention + bias_a) + mask_b * (mlp + bias_b)
    centred = r - r.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight + bias
    return inputs, y, r


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values."""
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def masks_of_forward(
    block_end: BlockEnd, rows: int, width: int, probability: float, place: DropoutSeed, site: int
) -> tuple[Tensor, Tensor]:
    """A branch's mask is r where that branch is ones and the rest zeros."""
    ones, zeros, none = torch.ones(rows, width), torch.zeros(rows, width), torch.zeros(width)
    rest = (zeros, none, none, EPSILON, probability, place, site)
    _, mask_a = block_end(ones, none, zeros, none, *rest)
    _, mask_b = block_end(zeros, none, ones, none, *rest)
    return mask_a, mask_b


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
    def block_end(self) -> BlockEnd:
        module = importlib.import_module("kernels.block_end")
        function: BlockEnd = module.bias_dropout_add_layer_norm
        return function

    @pytest.mark.parametrize("probability", [0.0, 0.3])
    @pytest.mark.parametrize("shape", [(1, 8), (5, 12), (37, 100), (2, 3, 20), (4, 6), (6, 2048)])
    def test_equals_float64(
        self, block_end: BlockEnd, shape: tuple[int, ...], probability: float
    ) -> None:
        values = leaves(shape)
        exact, y64, r64 = exact_block_end(values, probability, site=2)
        y, r = block_end(*values, EPSILON, probability, PLACE, site=2)
        torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(r.double(), r64, rtol=1e-6, atol=1e-6)
        upstream = (torch.randn(shape), torch.randn(shape))
        ours = torch.autograd.grad((y, r), values, upstream)
        expected = torch.autograd.grad((y64, r64), exact, [g.double() for g in upstream])
        for gradient, gradient64 in zip(ours, expected, strict=True):
            torch.testing.assert_close(gradient.double(), gradient64, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, block_end: BlockEnd, dtype: torch.dtype) -> None:
        values = leaves((11, 72), dtype)
        exact, y64, r64 = exact_block_end(values, 0.1, site=0)
        y, r = block_end(*values, EPSILON, 0.1, PLACE)
        assert (y.dtype, r.dtype) == (dtype, dtype)
        assert relative_error(r, r64) < 5e-3
        assert relative_error(y, y64) < 7e-3  # of the rounded r
        upstream = (torch.randn(11, 72).to(dtype), torch.randn(11, 72).to(dtype))
        ours = torch.autograd.grad((y, r), values, upstream)
        expected = torch.autograd.grad((y64, r64), exact, [g.double() for g in upstream])
        for gradient, gradient64 in zip(ours, expected, strict=True):
            assert gradient.dtype == dtype
            assert relative_error(gradient, gradient64) < 1e-2

    @pytest.mark.parametrize("probability", [0.0, 0.3])
    @pytest.mark.parametrize("output", [0, 1])
    def test_one_output_has_no_gradient(
        self, block_end: BlockEnd, output: int, probability: float
    ) -> None:
        """The last block's r leads nowhere."""
        values = leaves((5, 12))
        exact, *outputs64 = exact_block_end(values, probability, site=0)
        outputs = block_end(*values, EPSILON, probability, PLACE)
        upstream = torch.randn(5, 12)
        outputs[output].backward(upstream)
        outputs64[output].backward(upstream.double())
        for value, double in zip(values, exact, strict=True):
            expected = torch.zeros_like(value).double() if double.grad is None else double.grad
            torch.testing.assert_close(value.grad.double(), expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("width", [4, 12, 6, 80])
    @pytest.mark.parametrize(
        ("place", "site"),
        [
            (PLACE, 0),
            (DropoutSeed(seed=5, step=2, first_token=40), 0),
            (DropoutSeed(seed=5, step=1, first_token=40), 46),
            (DropoutSeed(seed=2**63 + 11, step=2**31 + 9, first_token=2**33 + 16), 3),
            (DropoutSeed(seed=5, step=1, first_token=40, tokens_n=SCATTERED), 2),
        ],
    )
    def test_masks_are_the_references(
        self, block_end: BlockEnd, width: int, place: DropoutSeed, site: int
    ) -> None:
        expected = dropout_masks(torch.Size((7, width)), 0.4, place, site, CPU)
        ours = masks_of_forward(block_end, 7, width, 0.4, place, site)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_masks_across_a_counter_word(self, block_end: BlockEnd) -> None:
        """Rows on both sides of group 2^32 have the masks of their own position."""
        first = 2**30 - 2
        masks = masks_of_forward(
            block_end, 4, 16, 0.5, DropoutSeed(seed=1, step=0, first_token=first), 0
        )
        for row in (0, 2, 3):
            place = DropoutSeed(seed=1, step=0, first_token=first + row)
            expected = dropout_masks(torch.Size((1, 16)), 0.5, place, 0, CPU)
            assert all(torch.equal(a[row], b[0]) for a, b in zip(masks, expected, strict=True))

    def test_backward_draws_the_same_masks(self, block_end: BlockEnd) -> None:
        """With weight 0 and dr = 1 the branches' gradients are the masks."""
        values = leaves((9, 20))
        values[5].data.zero_()
        _, r = block_end(*values, EPSILON, 0.4, PLACE, site=7)
        r.backward(torch.ones(9, 20))
        expected = dropout_masks(torch.Size((9, 20)), 0.4, PLACE, 7, CPU)
        assert torch.equal(values[0].grad, expected[0])
        assert torch.equal(values[2].grad, expected[1])
        assert torch.equal(values[4].grad, torch.ones(9, 20))

    def test_gradients_do_not_share_memory(self, block_end: BlockEnd) -> None:
        """Without dropout one tensor serves three inputs; writing to one leaf must not show."""
        values = leaves((5, 12))
        y, _ = block_end(*values, EPSILON)
        y.backward(torch.randn(5, 12))
        before = [value.grad.clone() for value in values]
        for index, value in enumerate(values):
            value.grad.fill_(float(index))
        for index, value in enumerate(values):
            assert bool((value.grad == index).all())
        assert torch.equal(before[0], before[4])

    def test_no_dropout_without_a_place(self, block_end: BlockEnd) -> None:
        values = leaves((5, 12))
        expected = block_end(*values, EPSILON)
        for probability, place in ((0.5, None), (0.0, PLACE), (1e-6, PLACE)):
            ours = block_end(*values, EPSILON, probability, place)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_strided_inputs(self, block_end: BlockEnd) -> None:
        """Slices of a wider tensor and an expanded gradient."""
        values = [value.detach() for value in leaves((3, 5, 12))]
        for index in (0, 2, 4):
            values[index] = torch.randn(3, 5, 20)[..., 4:16]
        results = []
        for copy in (False, True):
            inputs = [(v.contiguous() if copy else v).detach().requires_grad_() for v in values]
            y, r = block_end(*inputs, EPSILON, 0.2, PLACE)
            loss = y.sum() + r.sum()
            results.append((y, r, *torch.autograd.grad(loss, inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_refuses_what_it_cannot_take(self, block_end: BlockEnd) -> None:
        with pytest.raises(ValueError, match=r"width 8193: .* 1 to 8192"):
            block_end(*leaves((1, 8193)), EPSILON)
        for probability in (-0.1, 1.0):
            with pytest.raises(ValueError, match="probability"):
                block_end(*leaves((2, 8)), EPSILON, probability, PLACE)
        values = leaves((2, 8))
        with pytest.raises(ValueError, match=r"must be torch.float32 of shape \(2, 8\)"):
            block_end(values[0].bfloat16(), *values[1:], EPSILON)

    @pytest.mark.parametrize("threshold", [0, THRESHOLD])
    def test_operators(self, block_end: BlockEnd, threshold: int) -> None:
        """Schema, fake tensors and autograd of the registered operators."""
        tokens_n = torch.randperm(6) if threshold else None
        values, dropout = leaves((3, 2, 8)), ([-5, 1, 2, 40], tokens_n, threshold)
        operators = torch.ops.megaphi
        torch.library.opcheck(
            operators.bias_dropout_add_layer_norm.default, (*values, EPSILON, *dropout)
        )
        inputs = [value.detach() for value in values]
        _, r, mean, rstd = operators.bias_dropout_add_layer_norm(*inputs, EPSILON, *dropout)
        for dr in (torch.randn(3, 2, 8), None):
            torch.library.opcheck(
                operators.bias_dropout_add_layer_norm_backward.default,
                (torch.randn(3, 2, 8), dr, r, inputs[5], mean, rstd, *dropout),
            )

    @pytest.mark.parametrize("probability", [0.0, 0.3])
    def test_compiled_equals_eager(self, block_end: BlockEnd, probability: float) -> None:
        """Over steps with different masks, and without compiling for every step."""
        values = leaves((5, 12))
        upstream = (torch.randn(5, 12), torch.randn(5, 12))
        torch._dynamo.reset()  # else the other probability counts as a compile
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def function(values: list[Tensor], place: DropoutSeed) -> tuple[Tensor, Tensor]:
            return block_end(*values, EPSILON, probability, place, site=4)

        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for step in (3, 4, 5, 6):
            place = DropoutSeed(seed=5, step=step, first_token=7 * step)
            results = []
            for call in (function, compiled):
                outputs = call(values, place)
                results.append((*outputs, *torch.autograd.grad(outputs, values, upstream)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert counter.frame_count <= 2


@with_triton
def test_numerics_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter([f"{__file__}::TestNumerics"], at_least=44)


PLACE_ARGUMENTS = {
    **dict.fromkeys(("seed", "step", "site", "first_token"), "i64"),
    "tokens_ptr": "*i64",
}
CONSTANTS = dict.fromkeys(("threshold", "width", "block"), "constexpr")
FORWARD = {
    **{f"{name}_ptr": "*bf16" for name in ("attention", "attention_bias", "mlp", "mlp_bias")},
    **{f"{name}_ptr": "*bf16" for name in ("residual", "weight", "bias", "y", "r")},
    **{f"{name}_ptr": "*fp32" for name in ("mean", "rstd")},
    **{f"{name}_stride": "i32" for name in ("attention", "mlp", "residual")},
    "epsilon": "fp32",
    **PLACE_ARGUMENTS,
    **CONSTANTS,
}
BACKWARD = {
    **{f"{name}_ptr": "*bf16" for name in ("dy", "dr", "r", "weight")},
    **{f"{name}_ptr": "*fp32" for name in ("mean", "rstd")},
    **{f"{name}_ptr": "*bf16" for name in ("dresidual", "dattention", "dmlp")},
    "partial_ptr": "*fp32",
    **dict.fromkeys(("dy_stride", "dr_stride", "num_rows", "rows_per_program"), "i32"),
    **PLACE_ARGUMENTS,
    **CONSTANTS,
}


@with_triton
@pytest.mark.parametrize(
    ("capability", "kernel", "threshold", "registers", "loads"),
    [
        (80, "forward_kernel", THRESHOLD, 56, 7),
        (90, "forward_kernel", THRESHOLD, 56, 7),
        (90, "forward_kernel", 0, 40, 7),
        (80, "backward_kernel", THRESHOLD, 112, 4),
        (90, "backward_kernel", THRESHOLD, 112, 4),
        (100, "backward_kernel", THRESHOLD, 112, 4),
        (90, "backward_kernel", 0, 96, 4),
    ],
)
def test_resources_at_phi_1(
    capability: int, kernel: str, threshold: int, registers: int, loads: int
) -> None:
    """Width 2048 in bf16: 16-byte loads, no spills, two backward programs a multiprocessor."""
    needed = resources(
        "kernels.block_end",
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


@with_triton
def test_special_values_compile() -> None:
    """The launcher makes a None pointer and an integer of value 1 constants."""
    special = {"dr_ptr": None, "tokens_ptr": None, "num_rows": 1, "rows_per_program": 1}
    resources(
        "kernels.block_end",
        "backward_kernel",
        {**BACKWARD, **dict.fromkeys(special, "constexpr")},
        {**special, "threshold": THRESHOLD, "width": 100, "block": 128},
        capability=90,
        num_warps=4,
    )
