"""The linear layers of a block, above all their weight gradients in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaphi.model.linear import ADDS_UP, Linear, LinearWithFp32Gradient, linear


def with_fp32_gradient(tensor: Tensor) -> nn.Parameter:
    """A 16-bit parameter as FSDP2 gathers them, whose gradient is fp32."""
    parameter = nn.Parameter(tensor)
    parameter.grad_dtype = torch.float32
    setattr(parameter, ADDS_UP, True)
    return parameter


def test_product_is_forward_without_the_bias() -> None:
    layer = Linear(12, 8)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer.product(x), layer(x) - layer.bias)


def test_a_cpu_runs_pytorchs_own_operation() -> None:
    weight = with_fp32_gradient(torch.randn(8, 12).bfloat16())
    x = torch.randn(5, 12).bfloat16()
    assert linear(x, weight, None).grad_fn.name() != "LinearWithFp32GradientBackward"
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_micro_batches_add_up_in_fp32(dtype: torch.dtype) -> None:
    """Against float64; rounding each micro-batch to 16 bits would be a thousand times worse."""
    weight = with_fp32_gradient(torch.randn(8, 12).to(dtype))
    bias = with_fp32_gradient(torch.randn(8).to(dtype))
    exact_weight = torch.zeros(8, 12, dtype=torch.float64)
    exact_bias = torch.zeros(8, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(4, 16, 12).to(dtype).requires_grad_()
        grad_y = torch.randn(4, 16, 8).to(dtype)
        y = LinearWithFp32Gradient.apply(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
        y.backward(grad_y)
        rows = grad_y.double().flatten(0, 1)
        exact_weight += rows.t() @ x.detach().double().flatten(0, 1)
        exact_bias += rows.sum(dim=0)
        exact_x = grad_y.double() @ weight.detach().double()
        assert relative(x.grad, exact_x) < 5e-3
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    assert relative(weight.grad, exact_weight) < 1e-6
    assert relative(bias.grad, exact_bias) < 1e-6


def test_the_sum_grows_in_place() -> None:
    """The second micro-batch writes into the first one's gradient: no pass of its own."""
    weight = with_fp32_gradient(torch.randn(8, 12).bfloat16())
    x, grad_y = torch.randn(5, 12).bfloat16(), torch.randn(5, 8).bfloat16()
    LinearWithFp32Gradient.apply(x, weight, None).backward(grad_y)
    first, address = weight.grad.clone(), weight.grad.data_ptr()
    LinearWithFp32Gradient.apply(x, weight, None).backward(grad_y)
    assert weight.grad.data_ptr() == address
    torch.testing.assert_close(weight.grad, 2 * first)


def test_separate_passes_for_inputs_and_weights_add_once() -> None:
    """Zero-bubble schedules ask for the gradient of the input first, of the weight later."""
    weight = with_fp32_gradient(torch.randn(8, 12).bfloat16())
    setattr(weight, ADDS_UP, False)
    x = torch.randn(5, 12).bfloat16().requires_grad_()
    grad_y = torch.randn(5, 8).bfloat16()
    for _ in range(2):
        y = LinearWithFp32Gradient.apply(x, weight, None)
        torch.autograd.grad(y, x, grad_y, retain_graph=True)
        (grad_weight,) = torch.autograd.grad(y, weight, grad_y)
        weight.grad = grad_weight if weight.grad is None else weight.grad + grad_weight
    assert relative(weight.grad, 2 * grad_y.double().t() @ x.detach().double()) < 1e-6


def test_a_weight_that_is_computed_gets_its_gradient_too() -> None:
    """Under tensor parallelism the weight is a view of the parameter, not the parameter."""
    parameter = with_fp32_gradient(torch.randn(16, 12).bfloat16())
    x, grad_y = torch.randn(5, 12).bfloat16(), torch.randn(5, 8).bfloat16()
    for _ in range(2):
        LinearWithFp32Gradient.apply(x, parameter[:8], None).backward(grad_y)
    exact = 2 * grad_y.double().t() @ x.double()
    assert relative(parameter.grad[:8], exact) < 1e-2
    assert not parameter.grad[8:].any()


def relative(result: Tensor | None, exact: Tensor) -> float:
    """|result - exact| / |exact|."""
    assert result is not None
    return float((result.double() - exact).norm() / exact.norm())
