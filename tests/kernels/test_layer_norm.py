"""LayerNorm's Triton kernels against float64, and what they need on a GPU.

The numerics run in a child process with Triton's interpreter, since it and the compiler cannot
share a process. Nothing here imports the kernels at the top: they are for that child only.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

EPSILON = 1e-5
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values."""
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula, in the precision of the inputs."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight + bias


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random values that take gradients."""
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def doubles(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().double().requires_grad_() for value in values]


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
    def module(self) -> ModuleType:
        return importlib.import_module("kernels.layer_norm")

    @pytest.mark.parametrize("shape", [(1, 8), (5, 12), (37, 100), (2, 3, 7), (9, 1), (6, 2048)])
    def test_equals_float64(self, module: ModuleType, shape: tuple[int, ...]) -> None:
        values = leaves(shape, shape[-1:], shape[-1:])
        exact = doubles(values)
        y, y64 = module.layer_norm(*values, EPSILON), exact_layer_norm(*exact)
        torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
        upstream = torch.randn(shape)
        y.backward(upstream)
        y64.backward(upstream.double())
        for value, double in zip(values, exact, strict=True):
            torch.testing.assert_close(value.grad.double(), double.grad, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, module: ModuleType, dtype: torch.dtype) -> None:
        values = leaves((11, 72), (72,), (72,), dtype=dtype)
        exact = doubles(values)
        y, y64 = module.layer_norm(*values, EPSILON), exact_layer_norm(*exact)
        upstream = torch.randn(11, 72).to(dtype)
        y.backward(upstream)
        y64.backward(upstream.double())
        assert y.dtype == dtype
        assert relative_error(y, y64) < 5e-3
        for value, double in zip(values, exact, strict=True):
            assert value.grad.dtype == dtype
            assert relative_error(value.grad, double.grad) < 5e-3

    def test_sums_of_bf16_rows_are_fp32(self, module: ModuleType) -> None:
        """In bf16, 256 + 1 is 256."""
        values = leaves((13, 4), (4,), (4,), dtype=torch.bfloat16)
        upstream = torch.ones(13, 4)
        upstream[0] = 256.0
        module.layer_norm(*values, EPSILON).backward(upstream)
        assert values[2].grad.tolist() == [268.0] * 4

    def test_fp32_weights_of_bf16_rows(self, module: ModuleType) -> None:
        x, weight, bias = leaves((5, 16), (16,), (16,))
        y = module.layer_norm(x.bfloat16(), weight, bias, EPSILON)
        y.sum().backward()
        assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)

    def test_a_large_mean_costs_no_accuracy(self, module: ModuleType) -> None:
        x, weight, bias = leaves((4, 64), (64,), (64,))
        x = x.detach() + 1000
        exact = exact_layer_norm(x.double(), weight.double(), bias.double())
        y = module.layer_norm(x, weight, bias, EPSILON)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-3)

    def test_strided_rows(self, module: ModuleType) -> None:
        """A slice, a transposed tensor and an expanded gradient."""
        weight, bias = leaves((12,), (12,))
        sliced = torch.randn(3, 5, 20)[..., 4:16]
        turned = torch.randn(12, 5).t()
        for x in (sliced, turned):
            x = x.detach().requires_grad_()
            plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            ours = module.layer_norm(x, weight, bias, EPSILON)
            ours.sum().backward()
            module.layer_norm(plain, weight, bias, EPSILON).backward(torch.ones(x.shape))
            assert torch.equal(x.grad, plain.grad)

    def test_nan_stays_in_its_row(self, module: ModuleType) -> None:
        values = leaves((4, 12), (12,), (12,))
        values[0].data[2, 3] = float("nan")
        y = module.layer_norm(*values, EPSILON)
        (dx,) = torch.autograd.grad(y, values[0], torch.randn(4, 12))
        for result in (y, dx):
            assert result.isnan().any(-1).tolist() == [False, False, True, False]

    def test_no_rows(self, module: ModuleType) -> None:
        x, weight, bias = leaves((0, 16), (16,), (16,))
        module.layer_norm(x, weight, bias, EPSILON).sum().backward()
        assert x.grad.shape == (0, 16)
        assert float(weight.grad.abs().sum() + bias.grad.abs().sum()) == 0.0

    def test_refuses_what_it_cannot_take(self, module: ModuleType) -> None:
        with pytest.raises(ValueError, match=r"width 8193: .* 1 to 8192"):
            module.layer_norm(torch.ones(1, 8193), torch.ones(8193), torch.ones(8193), EPSILON)
        with pytest.raises(ValueError, match="float64"):
            module.layer_norm(torch.ones(2, 4).double(), torch.ones(4), torch.ones(4), EPSILON)
        with pytest.raises(ValueError, match=r"have shape \(4,\)"):
            module.layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(5), EPSILON)

    def test_operator(self, module: ModuleType) -> None:
        """Schema, fake tensors and autograd of the registered operators."""
        values = leaves((3, 4, 12), (12,), (12,))
        torch.library.opcheck(torch.ops.megaphi.layer_norm.default, (*values, EPSILON))
        x, weight, _ = (value.detach() for value in values)
        mean = x.mean(-1).view(-1)
        rstd = (x.var(-1, unbiased=False) + EPSILON).rsqrt().view(-1)
        torch.library.opcheck(
            torch.ops.megaphi.layer_norm_backward.default,
            (torch.randn(3, 4, 12), x, weight, mean, rstd),
        )

    def test_compiled_equals_eager(self, module: ModuleType) -> None:
        values, upstream = leaves((5, 12), (12,), (12,)), torch.randn(5, 12)

        def function(*inputs: Tensor) -> Tensor:
            return module.layer_norm(*inputs, EPSILON)

        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            y = call(*values)
            results.append((y, *torch.autograd.grad(y, values, upstream)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@with_triton
def test_numerics_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter([f"{__file__}::TestNumerics"], at_least=16)


ROWS, VECTOR, FP32 = "*bf16", "*bf16", "*fp32"
FORWARD = {
    "x_ptr": ROWS,
    "weight_ptr": VECTOR,
    "bias_ptr": VECTOR,
    "y_ptr": ROWS,
    "mean_ptr": FP32,
    "rstd_ptr": FP32,
    "x_stride": "i32",
    "epsilon": "fp32",
    "width": "constexpr",
    "block": "constexpr",
}
BACKWARD = {
    "x_ptr": ROWS,
    "dy_ptr": ROWS,
    "weight_ptr": VECTOR,
    "mean_ptr": FP32,
    "rstd_ptr": FP32,
    "dx_ptr": ROWS,
    "partial_ptr": FP32,
    "x_stride": "i32",
    "dy_stride": "i32",
    "num_rows": "i32",
    "rows_per_program": "i32",
    "width": "constexpr",
    "block": "constexpr",
}


@with_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [80]))
@pytest.mark.parametrize(
    ("kernel", "signature", "registers"),
    [("forward_kernel", FORWARD, 40), ("backward_kernel", BACKWARD, 80)],
)
def test_resources_at_phi_1(
    capability: int, kernel: str, signature: dict[str, str], registers: int
) -> None:
    """Width 2048 in bf16: eight elements a thread, 16-byte loads, no spills."""
    needed = resources(
        "kernels.layer_norm",
        kernel,
        signature,
        {"width": 2048, "block": 2048},
        capability=capability,
        num_warps=8,
    )
    assert needed.registers <= registers
    assert needed.spill_bytes == 0
    assert needed.shared_bytes <= 8192
    assert needed.vector_loads == 3
