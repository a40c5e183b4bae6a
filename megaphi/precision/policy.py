"""Which number format the compute runs in, decided once from the recipe and the device."""

import torch

from megaphi.config import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations in the forward and backward pass.

    `auto` is bf16 where the device multiplies bf16 natively, else fp32.

    Raises:
        ValueError: the device cannot do what was asked for.
    """
    if precision.dtype == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    if precision.dtype == "bf16" and device.type == "cuda" and not has_native_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"precision.dtype=bf16 needs compute capability 8.0 or higher, this is {name}; "
            "use precision.dtype=fp32"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.dtype]


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
