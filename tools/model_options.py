"""What verbs that load a model share: device, number format, tokenizer, sampling, threads."""

import argparse
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


def add_generation_options(
    parser: argparse._ActionsContainer, *, max_new_tokens: int, batch_size: int
) -> None:
    """Add the options of how a model completes prompts.

    Args:
        parser: a parser, or a group of one.
        max_new_tokens: default of that option.
        batch_size: likewise.
    """
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    add("--temperature", type=float, default=0.0, help="0: most probable token")
    add("--top-p", type=float, default=1.0, help="nucleus sampling")
    add("--seed", type=int, default=0, help="random seed of the samples")
    add("--samples", type=int, default=1, metavar="N", help="completions of each prompt")
    add("--batch-size", type=int, default=batch_size, metavar="N")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bf16 on a GPU")
    add("--cuda-graphs", choices=("auto", "never"), default="auto")
    add("--tokenizer", type=Path, metavar="DIR", help="instead of the model's own")


def check_sampling(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options of sampling that are out of range."""
    if not 0.0 <= options.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or above, not {options.temperature}")
    if not 0.0 < options.top_p <= 1.0:
        raise ValueError(f"--top-p must be above 0 and at most 1, not {options.top_p}")
    if options.samples > 1 and options.temperature == 0:
        raise ValueError(
            f"--samples {options.samples} at temperature 0 are all the same; give --temperature 0.8"
        )


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
