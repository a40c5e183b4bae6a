"""The casts to FP8 in plain PyTorch: the twins of `kernels.fp8_cast`.

FP8 has two formats (Micikevicius et al., arXiv 2209.05433): e4m3 with values up to 448 for weights
and activations, e5m2 up to 57344 for gradients. A tensor is multiplied by one scale before the
cast, so that its largest value lands near the largest of the format.

Suffixes: n rows, k columns, p partial results, r = n rounded up to a multiple of 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 16
"""cuBLAS takes FP8 products whose inner size is a multiple of this."""


def scale_of(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and inverse scale, fp32, of tensors whose largest absolute value is `amax`.

    1 where `amax` is zero, too small to divide by, or not finite: then no scale helps.
    """
    usable = amax.isfinite() & (amax >= 2.0**-100)
    scale = torch.where(usable, torch.finfo(dtype).max / amax, 1.0)
    inverse = torch.where(usable, amax / torch.finfo(dtype).max, 1.0)
    return scale, inverse


def fp8_scale(x_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and inverse scale for a cast of `x_nk` to `dtype`, from its largest absolute value.

    Args:
        x_nk: fp32, bf16 or fp16.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        Two fp32 scalars on the device of `x_nk`; both are 1 for zeros and where a value is not
        finite.
    """
    amax = x_nk.abs().amax() if x_nk.numel() > 0 else x_nk.new_zeros(())
    return scale_of(amax.float(), dtype)


def fp8_cast(x_nk: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x times scale to FP8, to nearest even; beyond the format's range its largest value.

    What is not finite becomes NaN, in e5m2 too: a cast must not hide it.

    Args:
        x_nk: fp32, bf16 or fp16.
        scale: fp32 scalar on the same device.
        dtype: float8_e4m3fn or float8_e5m2.
    """
    limit = torch.finfo(dtype).max
    scaled_nk = x_nk.float() * scale
    shows = x_nk.isfinite() & ~scaled_nk.isnan()
    return torch.where(shows, scaled_nk.clamp(-limit, limit), float("nan")).to(dtype)


def fp8_cast_transpose(
    x_nk: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8_cast` in both layouts, and the largest absolute values met on the way.

    Args:
        x_nk: fp32, bf16 or fp16.
        scale: fp32 scalar on the same device.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        FP8 [n, k]; its transpose [k, r], contiguous, with zeros beyond n; fp32 [p] largest
        absolute values of p parts of `x_nk`, in whose order and number implementations differ.
    """
    rows_nk = fp8_cast(x_nk, scale, dtype)
    padding = -x_nk.shape[0] % ROW_MULTIPLE
    # padded as bytes: few operations are defined on FP8 tensors
    columns_kr = F.pad(rows_nk.t().view(torch.uint8), (0, padding)).contiguous().view(dtype)
    partial_amax = x_nk.abs().amax().float() if x_nk.numel() > 0 else scale.new_zeros(())
    return rows_nk, columns_kr, partial_amax.reshape(1)
