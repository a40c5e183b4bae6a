"""What verbs that load a model share: device, number format, tokenizer, sampling, threads."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "fp32", "bf16", "fp16")


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch is imported.

    They spin by default. A token of a small model is some hundred waits, and on cores that another
    program uses as well each of them lasts until the kernel has run that program: generation was
    ten times and more slower than with one thread. What the user has set is left as it is.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise a `ValueError` for options of sampling that are out of range."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or above, not {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p must be above 0 and at most 1, not {top_p}")


def choose_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Resolve `auto`: the GPU if there is one; bf16 there and fp32 on a CPU.

    Raises:
        ValueError: the device is not a name that PyTorch knows, or is not there.
    """
    import torch

    from megaphi.formats.files import DTYPE_NAMES

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    if dtype == "auto":
        dtype = "fp32" if chosen.type == "cpu" else "bf16"
    return chosen, DTYPE_NAMES[dtype]


def tokenizer_file(directory: Path) -> Path:
    """tokenizer.json of a directory.

    Raises:
        ValueError: it is not there.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no tokenizer.json; name its directory with --tokenizer DIR")
    return path
