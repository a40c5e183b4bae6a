"""Which implementation of an operation runs.

`MEGAPHI_KERNELS=triton` takes the Triton kernels, `torch` the plain definitions of
`kernels.reference`; asking for what cannot run is an error, never a silent fallback. Not set means
`torch`: a kernel becomes the default only once a measurement on a GPU shows that it is faster than
torch.compile of its plain twin, or saves memory.

Without a GPU the Triton kernels run only in Triton's interpreter (`TRITON_INTERPRET=1`, set before
the first import), which is how their numerics are tested.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_VARIABLE = "MEGAPHI_KERNELS"


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(device: torch.device) -> bool:
    """Whether operations on `device` run their Triton kernel.

    Raises:
        ValueError: `MEGAPHI_KERNELS` has another value than `torch` or `triton`.
        RuntimeError: Triton was asked for and cannot run here; the message says why.
    """
    choice = os.environ.get(_VARIABLE, "torch")
    if choice == "torch":
        return False
    if choice != "triton":
        raise ValueError(f"{_VARIABLE}={choice}: must be torch or triton")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{_VARIABLE}=triton, but Triton is not installed")
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"{_VARIABLE}=triton needs a CUDA device, this tensor is on {device.type} "
            "(TRITON_INTERPRET=1 runs the kernels there, very slowly)"
        )
    return True


def launching_on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current CUDA device, which need not be the tensor's: make it so."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
