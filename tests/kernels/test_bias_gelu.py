"""The Triton bias + GELU kernels against float64 and torch.compile.

The numerics need Triton's interpreter: `test_numerics_in_a_child` runs them in a process of its
own; the resource limits come from compiling ahead of time, in others.
"""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

if interpreting():
    import kernels.bias_gelu as triton_version

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

SHAPES = [(1, 1), (5, 7), (37, 100), (2, 3, 1030), (4, 8192)]


def gelu_in_float64(x: Tensor, bias: Tensor) -> Tensor:
    """The formula with a tanh."""
    z = x.double() + bias.double()
    return 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())


def run(function, x: Tensor, bias: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and both gradients."""
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = function(x, bias)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), x.grad, bias.grad]


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new output starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_float64(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, bias = 2 * torch.randn(shape), torch.randn(shape[-1])
    upstream = torch.randn(shape)
    poisoned(monkeypatch)
    ours = run(triton_version.bias_gelu, x, bias, upstream)
    exact = run(gelu_in_float64, x.double(), bias.double(), upstream)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=3e-6)
        assert float((actual - expected).norm()) <= 1e-6 * float(expected.norm())


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_as_good_as_the_reference(
    shape: tuple[int, ...], bias_dtype: torch.dtype
) -> None:
    """Within twice the error of PyTorch's own bf16, though the interpreter truncates."""
    torch.manual_seed(1)
    x, bias = (2 * torch.randn(shape)).bfloat16(), torch.randn(shape[-1]).bfloat16()
    upstream = torch.randn(shape).bfloat16()
    exact = run(gelu_in_float64, x.double(), bias.double(), upstream)
    theirs = run(reference.bias_gelu, x, bias, upstream)
    ours = run(triton_version.bias_gelu, x, bias.to(bias_dtype), upstream)
    assert [result.dtype for result in ours] == [torch.bfloat16, torch.bfloat16, bias_dtype]
    for actual, twin, expected in zip(ours, theirs, exact, strict=True):
        size = expected.abs().max()
        assert (actual - expected).abs().max() <= 2 * (twin - expected).abs().max() + 2**-7 * size
        assert float((actual - expected).norm() / expected.norm()) < 5e-3


@interpreted
def test_far_from_zero() -> None:
    """Saturated on both sides, no overflow on the way; a NaN stays where it is."""
    x = torch.tensor([[-1e18, -100.0, -12.0, 12.0, 100.0, 1e18]])
    bias = torch.zeros(6)
    y, grad_x, grad_bias = run(triton_version.bias_gelu, x, bias, torch.ones_like(x))
    torch.testing.assert_close(y, x.clamp(min=0), rtol=0, atol=1e-20)
    torch.testing.assert_close(grad_x, (x > 0).float(), rtol=0, atol=1e-6)
    assert torch.equal(grad_bias, grad_x[0])
    x[0, 2] = float("nan")
    results = run(triton_version.bias_gelu, x, bias, torch.ones_like(x))
    for result in results:
        assert result.flatten().isnan().tolist() == [False, False, True, False, False, False]


@interpreted
def test_strided_inputs_and_gradients() -> None:
    torch.manual_seed(2)
    wide, bias = torch.randn(6, 50), torch.randn(80)[::2]
    x = wide[:, 5:45].requires_grad_()
    bias.requires_grad_()
    for source in (x, torch.randn(40, 6, requires_grad=True).t()):
        results = []
        for function in (triton_version.bias_gelu, reference.bias_gelu):
            loss = function(source, bias).sum()  # an expanded gradient
            results.append(torch.autograd.grad(loss, (source, bias), retain_graph=True))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_no_rows_and_a_bias_that_does_not_fit() -> None:
    x, bias = torch.randn(0, 8), torch.randn(8)
    y, grad_x, grad_bias = run(triton_version.bias_gelu, x, bias, torch.randn(0, 8))
    assert y.shape == grad_x.shape == (0, 8)
    assert torch.equal(grad_bias, torch.zeros(8))
    with pytest.raises(ValueError, match="bias"):
        triton_version.bias_gelu(torch.randn(2, 8), torch.randn(1))


@interpreted
def test_bias_gradient_is_reproducible_and_its_cut_depends_on_rows_only() -> None:
    torch.manual_seed(3)
    x, bias, upstream = torch.randn(70, 33), torch.randn(33), torch.randn(70, 33)
    first, second = (run(triton_version.bias_gelu, x, bias, upstream)[2] for _ in range(2))
    assert torch.equal(first, second)
    cuts = {rows: triton_version.rows_per_program(rows) for rows in (1, 512, 513, 2048, 2**20)}
    assert cuts == {1: 8, 512: 8, 513: 16, 2048: 32, 2**20: 128}


@interpreted
def test_operator_registration() -> None:
    x = torch.randn(2, 5, 12, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.megaphi.bias_gelu.default, (x, bias))
    arguments = (torch.randn(2, 5, 12), x.detach(), bias.detach())
    torch.library.opcheck(torch.ops.megaphi.bias_gelu_backward.default, arguments)


@interpreted
def test_compiled_equals_eager() -> None:
    torch.manual_seed(4)
    x, bias, upstream = torch.randn(2, 5, 40), torch.randn(40), torch.randn(2, 5, 40)
    function = triton_version.bias_gelu
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = run(function, x, bias, upstream)
    for actual, expected in zip(run(compiled, x, bias, upstream), eager, strict=True):
        assert torch.equal(actual, expected)


@needs_triton
def test_numerics_in_a_child() -> None:
    assert_passes_in_the_interpreter(
        [__file__, "-k", "not child and not ahead_of_time"], at_least=21
    )


FORWARD = {"x": "*bf16", "bias": "*bf16", "y": "*bf16", "x_stride": "i32"}
BACKWARD = {
    **dict.fromkeys(("grad_y", "x", "bias", "grad_x"), "*bf16"),
    "partials": "*fp32",
    "grad_y_stride": "i32",
    "x_stride": "i32",
}


@needs_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize(
    ("kernel", "signature", "rows", "registers", "vector_loads"),
    [
        # the bias and four rows; the bias and, in the loop, dy and x
        ("bias_gelu_forward_kernel", FORWARD, 4, 40, 5),
        ("bias_gelu_backward_kernel", BACKWARD, 128, 56, 3),
    ],
)
def test_compiled_ahead_of_time_at_phi1_width(
    kernel: str,
    signature: dict[str, str],
    rows: int,
    registers: int,
    vector_loads: int,
    capability: int,
) -> None:
    constants = {"ROWS": rows, "BLOCK": 1024}
    found = resources(
        "kernels.bias_gelu",
        kernel,
        {
            **signature,
            **dict.fromkeys(("rows", "width"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        constants,
        capability=capability,
        num_warps=4,
    )
    assert found.spill_bytes == 0
    assert found.registers <= registers
    assert found.vector_loads >= vector_loads
