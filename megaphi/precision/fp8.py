"""Linear layers that multiply in FP8, on `torch._scaled_mm` and the casts of `kernels.fp8_cast`.

A linear layer is three matrix products, and each may run in FP8 at twice the rate of bf16:

    y  = x W^T     x, W in e4m3, more mantissa
    dx = dy W      dy in e5m2, more range, W in e4m3
    dW = dy^T x    dy in e5m2, x in e4m3; leaves the product in fp32

Each tensor has one scale (Micikevicius et al., arXiv 2209.05433). With *current* scaling it comes
from the tensor's own largest value, one more pass over it; with *delayed* scaling from the largest
value of the steps before, which may saturate for a step when values jump. Weights always have
current scaling: they are cast once a step, not once a micro-batch. Accumulation in the first
product is cuBLAS's fast one (fewer bits between additions), in the other two the exact one, as
Transformer Engine and torchao do. Biases, LayerNorm, attention, embedding and head stay in bf16.

torch.compile runs these layers eagerly (`torch.compiler.disable`): a graph ends before one and
begins again after it, since the copies of the weights outlive a call.

Suffixes: n rows (tokens), k inputs, m outputs, r = n rounded up to a multiple of 16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import ops
from megaphi.model.linear import Linear
from megaphi.parallel.tensor import local
from megaphi.precision.fp8_interface import SIZE_MULTIPLE, Fp8
from megaphi.precision.scaling import E4M3, E5M2, FORMATS, GRADIENT, INPUT, DelayedScaling


class NativeFp8(Fp8):
    """FP8 layers of this file, and what they share.

    A copy of a weight in FP8 is good for one version of the weights. FSDP2 gathers new weights
    into the memory of the old without raising their version counter, so `version` is counted here:
    `after_step` and `weights_changed` raise it. In-place changes of weights that are not sharded
    are seen without either. Weights that are gathered anew within a step, as with
    `parallel.reshard_after_forward`, may be cast anew. The copies take two bytes a weight on every
    process and are not freed with the gathered weights: the backward pass needs them.

    Args:
        names: layers of a block to make in FP8, of qkv, out, fc1 and fc2.
        scaling: where the scales of inputs and gradients come from.
        history_length: delayed scaling: steps whose largest value counts.
    """

    def __init__(
        self,
        names: Sequence[str],
        scaling: Literal["current", "delayed"] = "current",
        history_length: int = 16,
    ) -> None:
        super().__init__(names)
        self.scaling = scaling
        self.history_length = history_length
        self.delayed: DelayedScaling | None = None
        self.version = 0

    def make_fp8(self, in_features: int, out_features: int) -> Linear:
        """A layer of this file."""
        return Fp8Linear(in_features, out_features, self)

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Number the layers, and for delayed scaling make their history on `device`."""
        layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
        for number, layer in enumerate(layers):
            layer.number = number
        if self.scaling == "delayed":
            self.delayed = DelayedScaling(len(layers), self.history_length, device)

    def weights_changed(self) -> None:
        """Copies of the weights are no longer good, nor are scales from another history."""
        self.version += 1
        if self.delayed is not None:
            self.delayed.start_from_history()

    def after_step(self, group: dist.ProcessGroup | None) -> None:
        """New weights, and for delayed scaling new scales."""
        self.version += 1
        if self.delayed is not None:
            self.delayed.after_step(group)

    def state_tensors(self) -> dict[str, Tensor]:
        """The history of delayed scaling; nothing for current scaling."""
        if self.delayed is None:
            return {}
        return {"fp8.amax_history": self.delayed.history_lth}


@dataclass(frozen=True)
class Cast:
    """A tensor in FP8, in both layouts, and the factor that undoes its scale."""

    rows: Tensor
    """[n, k]."""
    columns: Tensor
    """[k, r], zeros beyond n."""
    inverse: Tensor
    """fp32 scalar."""


class Fp8Linear(Linear):
    """y = x W^T + b with its three products in FP8; weight and bias stay what they are.

    Any number of rows will do: where they are the inner size, in the gradient of the weight, the
    transposed copies are padded with zeros to a multiple of 16.
    """

    def __init__(self, in_features: int, out_features: int, shared: NativeFp8) -> None:
        super().__init__(in_features, out_features)
        self.shared = shared
        self.number: int | None = None
        self.weight_cast: Cast | None = None
        self.weight_key: tuple[int, int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b, [..., out_features]."""
        y: Tensor = fp8_linear(x, local(self.weight), local(self.bias), self)
        return y

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T, without the bias, [..., out_features]."""
        y: Tensor = fp8_linear(x, local(self.weight), None, self)
        return y

    def cast_weight(self, weight: Tensor) -> Cast:
        """The weight in FP8, from memory if it has not changed since it was cast."""
        key = (self.shared.version, weight.data_ptr(), weight._version)
        if self.weight_cast is None or key != self.weight_key:
            weight = weight.detach()
            scale, inverse = ops.fp8_scale(weight, E4M3)
            rows, columns, _ = ops.fp8_cast_transpose(weight, scale, E4M3)
            self.weight_cast, self.weight_key = Cast(rows, columns, inverse), key
        return self.weight_cast

    def scale(self, x_nk: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Scale and inverse for the input or the gradient."""
        delayed = self.delayed_scaling()
        if delayed is not None and delayed.ready:
            assert self.number is not None
            return delayed.scales[self.number][which]
        return ops.fp8_scale(x_nk, FORMATS[which])

    def cast(self, x_nk: Tensor, which: int) -> Cast:
        """The input or the gradient in FP8; delayed scaling takes note of its largest value."""
        scale, inverse = self.scale(x_nk, which)
        rows, columns, partial_amax = ops.fp8_cast_transpose(x_nk, scale, FORMATS[which])
        delayed = self.delayed_scaling()
        if delayed is not None and partial_amax.numel() > 0:
            assert self.number is not None
            delayed.record(self.number, which, partial_amax)
        return Cast(rows, columns, inverse)

    def delayed_scaling(self) -> DelayedScaling | None:
        """The history, if scaling is delayed."""
        shared = self.shared
        attached = shared.delayed is not None and self.number is not None
        assert shared.scaling == "current" or attached, "attach(model, device) was not called"
        return shared.delayed


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Fp8Linear) -> Tensor:
    """Compute x W^T + b in FP8, in the dtype of x.

    Outside autograd the input is cast in one layout only, and delayed scaling takes no note of it.
    """
    needs_gradient = x.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and needs_gradient:
        result: Tensor = ScaledLinear.apply(x, weight, bias, layer)  # type: ignore[no-untyped-call]
        return result
    x_nk = x.flatten(0, -2)
    scale, inverse = layer.scale(x_nk, INPUT)
    rows = ops.fp8_cast(x_nk, scale, E4M3)
    return forward_product(rows, inverse, layer.cast_weight(weight), bias, x)


def forward_product(
    rows_nk: Tensor, inverse: Tensor, weight: Cast, bias: Tensor | None, x: Tensor
) -> Tensor:
    """Compute x W^T + b in the dtype and with the leading dimensions of `x`."""
    y_nm = scaled_product(
        rows_nk, weight.rows.t(), inverse, weight.inverse, out_dtype=x.dtype, fast=True, bias=bias
    )
    return y_nm.view(*x.shape[:-1], -1)


class ScaledLinear(torch.autograd.Function):
    """The three products; between forward and backward it keeps FP8 copies only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Fp8Linear
    ) -> Tensor:
        """Cast, multiply, and keep what the backward pass needs: transposes."""
        weight_cast = layer.cast_weight(weight)
        x_cast = layer.cast(x.flatten(0, -2), INPUT)
        kept = (x_cast.columns, x_cast.inverse, weight_cast.columns, weight_cast.inverse)
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.has_bias = layer, bias is not None
        return forward_product(x_cast.rows, x_cast.inverse, weight_cast, bias, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x in the dtype of `grad_y`, of W and b in fp32, which autograd adds up."""
        x_columns_kr, x_inverse, w_columns_km, w_inverse = ctx.saved_tensors
        rows_nm = grad_y.flatten(0, -2)
        grad = ctx.layer.cast(rows_nm, GRADIENT)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x_nk = scaled_product(
                grad.rows,
                w_columns_km.t(),
                grad.inverse,
                w_inverse,
                out_dtype=grad_y.dtype,
                fast=False,
            )
            grad_x = grad_x_nk.view(*grad_y.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            grad_weight = scaled_product(
                grad.columns,
                x_columns_kr.t(),
                grad.inverse,
                x_inverse,
                out_dtype=torch.float32,
                fast=False,
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows_nm.sum(dim=0, dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, None


def scaled_product(
    a_nk: Tensor,
    b_km: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """inverse_a inverse_b A B + bias through cuBLAS.

    The asserts are cuBLAS's own conditions, since the same call on a CPU has none of them.

    Args:
        a_nk: FP8, contiguous.
        b_km: FP8, the transpose of a contiguous tensor; at most one of the two is e5m2.
        inverse_a: fp32 scalar, the inverse of the scale that A was cast with.
        inverse_b: the same of B.
        out_dtype: fp32, bf16 or fp16.
        fast: fewer bits between additions, faster; the error of a sum grows with its length.
        bias: [m], added inside the product where its dtype allows.
    """
    dtypes = (a_nk.dtype, b_km.dtype)
    assert all(dtype in FORMATS for dtype in dtypes), f"not FP8: {dtypes}"
    assert dtypes != (E5M2, E5M2), "cuBLAS has no product of two e5m2 factors"
    assert a_nk.ndim == b_km.ndim == 2, f"not matrices: {a_nk.shape}, {b_km.shape}"
    assert a_nk.shape[1] == b_km.shape[0], f"sizes do not fit: {a_nk.shape}, {b_km.shape}"
    assert a_nk.is_contiguous(), "A must be row-major"
    assert b_km.t().is_contiguous(), "B must be column-major"
    for size in b_km.shape:
        assert size % SIZE_MULTIPLE == 0, f"{size} is not a multiple of {SIZE_MULTIPLE}"
    for inverse in (inverse_a, inverse_b):
        assert inverse.dtype == torch.float32, f"scale of {inverse.dtype}, not fp32"
        assert inverse.numel() == 1, f"scale of shape {inverse.shape}, not one number"
        assert inverse.device == a_nk.device, f"scale on {inverse.device}, not {a_nk.device}"
    assert out_dtype in (torch.float32, torch.bfloat16, torch.float16), f"result of {out_dtype}"
    # cuBLAS adds a 16-bit bias to a result of its own dtype only
    inside = bias is not None and out_dtype != torch.float32 and bias.dtype == out_dtype
    product = torch._scaled_mm(
        a_nk,
        b_km,
        scale_a=inverse_a,
        scale_b=inverse_b,
        bias=bias if inside else None,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )
    return product if bias is None or inside else product + bias.to(out_dtype)
