"""The linear layers of a block.

A layer hands out its product with and without the bias, because most biases of a block are added
by the fused kernel that follows. Other number formats replace the class (`megaphi.precision`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.matmul import add_product_, fp32_product
from megaphi.parallel.tensor import local


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b, [..., out_features]."""
        return linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """X W^T, without the bias, [..., out_features]."""
        return linear(x, self.weight, None)


ADDS_UP = "gradient_adds_up_in_gemm"
"""Attribute of a weight whose backward pass runs once a micro-batch."""

MakeLinear = Callable[[str, int, int], Linear]
"""Makes the layer of a name (qkv, out, fc1, fc2) with so many inputs and outputs."""


def make_linear(name: str, in_features: int, out_features: int) -> Linear:
    """A layer in the dtype of its input, whatever its name."""
    return Linear(in_features, out_features)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X W^T + b; where the weight keeps an fp32 gradient, its GEMM writes and adds it up in fp32.

    torch.compile sees PyTorch's own operation instead, and so does a CPU, which has no GEMM with
    16-bit inputs and fp32 output: there the gradient of a micro-batch is rounded to 16 bits before
    it is added up.
    """
    # asked first: the compiler cannot follow the other question
    if torch.compiler.is_compiling() or not gradient_in_gemm(x, weight):
        return F.linear(x, local(weight), None if bias is None else local(bias))
    bias = None if bias is None else local(bias)
    result: Tensor = LinearWithFp32Gradient.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def gradient_in_gemm(x: Tensor, weight: Tensor) -> bool:
    """Whether the GEMM of a weight's gradient can and should write fp32."""
    if not x.is_cuda or x.dtype == torch.float32:
        return False
    return weight.is_leaf and getattr(weight, "grad_dtype", None) == torch.float32


def fp32_weight_gradient(weight: Tensor, grad_nm: Tensor, x_nk: Tensor) -> Tensor | None:
    """fp32 gradient of a weight, or None where it was added onto `weight.grad` in place.

    Args:
        weight: the parameter, [m, k]; under tensor parallelism a DTensor, and so is its gradient.
        grad_nm: gradient of this process's outputs.
        x_nk: this process's inputs.
    """
    adds_up = weight.is_leaf and getattr(weight, ADDS_UP, False)
    so_far = weight.grad if adds_up else None
    if so_far is None:
        return as_placed(fp32_product(grad_nm.t(), x_nk), weight)
    add_product_(local(so_far), grad_nm.t(), x_nk)
    return None


def as_placed(part: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is laid out on the tensor axis as `like` is."""
    if not isinstance(like, DTensor):
        return part
    placed: Tensor = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False)
    return placed


class LinearWithFp32Gradient(torch.autograd.Function):
    """`F.linear` whose weight gradient leaves the GEMM in fp32.

    The first micro-batch of a step returns it; the next ones add theirs onto `weight.grad` inside
    the GEMM, 8 instead of 12 bytes a weight and micro-batch, and without a rounding to 16 bits.
    The weight must be a leaf whose `grad_dtype` is fp32, or a tensor computed from one. Only a leaf
    that says so (`ADDS_UP`) is added onto: a schedule that asks for the gradients of inputs and of
    weights in separate backward passes would add twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + b; the weight may be a DTensor, of which this is the local part."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, local(weight), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, of W (None where it was added up in place), and of b."""
        x, weight = ctx.saved_tensors
        grad_x = grad_y @ local(weight) if ctx.needs_input_grad[0] else None
        rows_nm, rows_nk = grad_y.flatten(0, -2), x.flatten(0, -2)
        grad_bias = rows_nm.sum(dim=0, dtype=torch.float32) if ctx.has_bias else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = fp32_weight_gradient(weight, rows_nm, rows_nk)
        return grad_x, grad_weight, grad_bias
