"""Which attention kernel a run takes, and why: decided from what it needs and what is there.

`probe` looks at the machine once; `choose` is a function of its arguments, so that every card and
every set of installed packages can be tested without them.

What is known of the kernels (flash-attention 2.8 and its `hopper` and `flash_attn/cute` folders,
Transformer Engine 2.x, PyTorch's `sdp_utils.cpp`):

- flash-attn 3 and 4 have no dropout.
- cuDNN's dropout has a resolution of 1/16, so 0.1 is not what it drops; PyTorch refuses such a
  probability from 2.11 on, older ones and Transformer Engine round it. cuDNN 9.11 to 9.13 have no
  dropout, and up to 9.15 a length that 128 does not divide makes it read out of bounds.
- PyTorch's flash attention is flash-attn 2, except that its variable-length form has no dropout.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, cast, get_args

import torch
from torch.nn.attention.varlen import varlen_attn

from megaphi.config import AttentionBackend, Recipe
from megaphi.device import compute_capability, device_name, is_gpu

Backend = Literal[AttentionBackend, "short", "sdpa"]
"""short: `megaphi.model.short_attention`; sdpa: PyTorch's own choice of kernel, with an explicit
mask where one is needed; the others as in `compute.attention`."""

_DEVICES = {"cuda": "CUDA device", "cpu": "CPU"}
_WITH_MASK = "PyTorch's choice of kernel with an explicit mask (slower, and more memory)"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a machine can run."""

    device_type: str
    """cpu or cuda."""
    device_name: str = "this CPU"
    """For messages."""
    compute_capability: tuple[int, int] | None = None
    """Of a CUDA device: (9, 0) for H100 and H200."""
    torch_version: str = torch.__version__
    cuda_version: str | None = None
    """CUDA that PyTorch was built with."""
    cudnn_version: int | None = None
    """cuDNN that PyTorch loads, 91501 for 9.15.1."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that can be used, by backend."""
    torch_varlen: bool = False
    """PyTorch's `varlen_attn` takes a window, which is how it is told to be causal."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Why a package cannot be used, by backend."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a run asks of attention; always causal, as many key as query heads."""

    dtype: torch.dtype
    """Of queries, keys and values; fp8 linear layers still hand over bf16."""
    head_size: int
    sequence_length: int
    dropout: float = 0.0
    """Share of attention probabilities to drop."""
    documents: bool = False
    """A token sees its own document only."""
    decoding: bool = False
    """There is a key/value cache or left padding, so queries and keys differ."""


@dataclass(frozen=True)
class Choice:
    """The backend of a run."""

    backend: Backend
    reason: str
    """For people: what it is, and why nothing faster."""


@dataclass(frozen=True)
class _Kernel:
    """Limits of a backend."""

    title: str
    majors: tuple[int, ...]
    """Major compute capabilities of the GPUs that it runs on."""
    dropout: Literal["no", "sixteenths", "any"]
    varlen: bool
    """Takes documents of different lengths side by side."""
    max_head_size: int | None
    """Elements of a head, a multiple of 8; None where any number will do."""
    module: str | None = None
    """What has to be importable; None where PyTorch has the kernel."""
    distribution: str | None = None
    """The package that has the module, for its version."""
    devices: tuple[str, ...] = ("cuda",)
    """Types of devices that it runs on: cuda, cpu."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    """Of queries, keys and values, where it computes in them and gains by it."""
    max_length: int | None = None
    """Tokens of a sequence up to which it is worth choosing; None where there is no such limit."""


_KERNELS: dict[str, _Kernel] = {
    "flash4": _Kernel(
        "flash-attn 4", (9, 10, 11), "no", True, 128, "flash_attn.cute", "flash-attn-4"
    ),
    "flash3": _Kernel(
        "flash-attn 3", (9,), "no", True, 256, "flash_attn_interface", "flash_attn_3"
    ),
    "flash2": _Kernel(
        "flash-attn 2",
        (8, 9, 10, 11, 12),
        "any",
        True,
        256,
        "flash_attn.flash_attn_interface",
        "flash-attn",
    ),
    "te": _Kernel(
        "Transformer Engine",
        (8, 9, 10, 12),
        "sixteenths",
        True,
        128,
        "transformer_engine.pytorch",
        "transformer-engine",
    ),
    "cudnn": _Kernel("cuDNN through PyTorch", (8, 9, 10, 12), "sixteenths", False, 128),
    "flash": _Kernel("PyTorch's flash attention", (8, 9, 10, 11, 12), "any", True, 256),
    "short": _Kernel(
        "short attention",
        (),
        "no",
        False,
        None,
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        max_length=512,
    ),
}
_FASTEST_FIRST: dict[int, tuple[Backend, ...]] = {
    10: ("flash4", "cudnn", "flash2", "flash", "te"),
    9: ("flash3", "cudnn", "flash2", "flash", "te"),
}
"""By major compute capability. flash-attn 4 also runs on Hopper (9), when asked for; flash-attn 3
and cuDNN were made for it."""
_FASTEST_ELSEWHERE: tuple[Backend, ...] = ("flash2", "flash", "te")
_FASTEST_ON_CPU: tuple[Backend, ...] = ("short",)


def training_need(recipe: Recipe, dtype: torch.dtype) -> Need:
    """What training by a recipe asks of attention, computing in `dtype`."""
    return Need(
        dtype=dtype,
        head_size=recipe.model.head_size,
        sequence_length=recipe.data.sequence_length,
        dropout=recipe.model.attention_dropout,
        documents=recipe.data.mask_documents,
    )


def probe(device: torch.device) -> Capabilities:
    """Look at a device and at the packages that can be imported."""
    if not is_gpu(device):
        return Capabilities(device_type=device.type)
    versions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for backend in (name for name, kernel in _KERNELS.items() if kernel.module is not None):
        found, problem = find_package(backend)
        if found is None:
            problems[backend] = problem
        else:
            versions[backend] = found
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return Capabilities(
        device_type="cuda",
        device_name=device_name(device),
        compute_capability=compute_capability(device),
        cuda_version=torch.version.cuda,
        # on AMD cards it is the version of another library
        cudnn_version=cudnn if torch.version.cuda is not None else None,
        versions=versions,
        torch_varlen="window_size" in inspect.signature(varlen_attn).parameters,
        problems=problems,
    )


def find_package(backend: str) -> tuple[str | None, str]:
    """Import the package of a backend: its version and "", or None and why it cannot be used.

    A binary built for another PyTorch or CUDA fails with one of several errors when it is loaded.
    """
    module, distribution = _KERNELS[backend].module, _KERNELS[backend].distribution
    assert module is not None, f"{backend} needs no package"
    assert distribution is not None, f"{backend} names no package"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None, "is not installed"
        return None, f"cannot be imported: {_first_line(error)}"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"cannot be imported: {_first_line(error)}"
    try:
        return version(distribution), ""
    except PackageNotFoundError:
        return "of an unknown version", ""


def choose(need: Need, capabilities: Capabilities, asked: str = "auto") -> Choice:
    """Decide on the backend.

    Args:
        need: what the run asks of attention.
        capabilities: what the machine can run.
        asked: `compute.attention`: a backend, or auto for the fastest that can do it.

    Raises:
        ValueError: the backend that was asked for cannot do it; says why and what to use.
    """
    automatic = _choose_automatically(need, capabilities)
    if asked == "auto":
        return automatic
    if asked == "plain":
        return Choice("plain", "asked for; the formula itself, with masks of the global position")
    kernel = _KERNELS.get(asked)
    if kernel is None:
        known = ", ".join(get_args(AttentionBackend))
        raise ValueError(f"compute.attention={asked} is not one of {known}")
    obstacle = _obstacle(asked, need, capabilities)
    if obstacle is not None:
        raise ValueError(
            f"compute.attention={asked}: {kernel.title} {obstacle}; set compute.attention to auto, "
            f"which takes {automatic.backend} here"
        )
    return Choice(cast(Backend, asked), f"asked for; {_describe(asked, capabilities)}")


def _choose_automatically(need: Need, capabilities: Capabilities) -> Choice:
    """The fastest backend that can do what is needed."""
    on_cpu = capabilities.device_type != "cuda"
    if on_cpu and need.dropout > 0:
        return Choice(
            "plain", "on a CPU; the formula itself, so that dropout does not depend on the cut"
        )
    if need.decoding:
        return Choice("sdpa", f"a cache or padding; {_WITH_MASK}")
    if on_cpu:
        ranking, otherwise = _FASTEST_ON_CPU, "PyTorch's own kernel on a CPU"
    elif need.dtype not in (torch.bfloat16, torch.float16):
        return Choice("sdpa", f"in {_name(need.dtype)}; PyTorch's memory-efficient or plain kernel")
    else:
        ranking = _FASTEST_FIRST.get(_major(capabilities), _FASTEST_ELSEWHERE)
        otherwise = "PyTorch's choice of kernel"
    refused: list[str] = []
    for backend in ranking:
        obstacle = _obstacle(backend, need, capabilities)
        if obstacle is None:
            chosen = _describe(backend, capabilities)
            return Choice(backend, "; ".join([chosen, *refused]))
        refused.append(f"{_KERNELS[backend].title} {obstacle}")
    return Choice("sdpa", "; ".join([_WITH_MASK if need.documents else otherwise, *refused]))


def _obstacle(backend: str, need: Need, capabilities: Capabilities) -> str | None:
    """Why a backend cannot do what is needed, as the end of a sentence; None if it can."""
    kernel = _KERNELS[backend]
    if capabilities.device_type not in kernel.devices:
        return f"needs a {' or a '.join(_DEVICES[device] for device in kernel.devices)}"
    if need.decoding:
        return "does not run here with a cache or padding"
    if need.dtype not in kernel.dtypes:
        known = " and ".join(map(_name, kernel.dtypes))
        return f"computes in {known} only, not in {_name(need.dtype)}"
    if kernel.max_length is not None and need.sequence_length > kernel.max_length:
        return f"is for up to {kernel.max_length} tokens, not {need.sequence_length:,}"
    if capabilities.device_type == "cuda" and _major(capabilities) not in kernel.majors:
        supported = ", ".join(f"{major}.x" for major in kernel.majors)
        return (
            f"runs on compute capability {supported}, not on {capabilities.device_name} "
            f"({_dotted(capabilities)})"
        )
    if kernel.module is not None and backend not in capabilities.versions:
        return capabilities.problems.get(backend, "is not installed")
    return (
        _head_size_obstacle(backend, need, capabilities)
        or _dropout_obstacle(backend, need, capabilities)
        or _documents_obstacle(backend, need, capabilities)
        or (_cudnn_obstacle(need, capabilities) if backend == "cudnn" else None)
    )


def _head_size_obstacle(backend: str, need: Need, capabilities: Capabilities) -> str | None:
    """Sizes of a head that a backend cannot compute, backward pass included."""
    limit = _KERNELS[backend].max_head_size
    if limit is None:
        return None
    if backend == "flash4" and _major(capabilities) == 9:
        limit = 256
    # compute capability 8.6, 8.9 and 12.x have too little shared memory for the backward pass
    if backend in ("flash", "flash2") and _major(capabilities) in (8, 12):
        limit = 256 if capabilities.compute_capability == (8, 0) else 192
    if need.head_size > limit:
        return f"has heads of up to {limit} elements, not {need.head_size}"
    if need.head_size % 8 != 0:
        return f"needs heads of a multiple of 8 elements, not {need.head_size}"
    return None


def _dropout_obstacle(backend: str, need: Need, capabilities: Capabilities) -> str | None:
    """Dropout that a backend does not have, or would round."""
    if need.dropout == 0.0:
        return None
    kind = _KERNELS[backend].dropout
    if kind == "no":
        return "has no dropout"
    if kind == "sixteenths" and not (need.dropout * 16).is_integer():
        return f"drops in steps of 1/16 (cuDNN), so not {need.dropout}"
    cudnn = capabilities.cudnn_version
    if kind == "sixteenths" and cudnn is not None and 91100 <= cudnn < 91400:
        return f"has no dropout with cuDNN {_cudnn_name(cudnn)} (9.11 to 9.13)"
    return None


def _documents_obstacle(backend: str, need: Need, capabilities: Capabilities) -> str | None:
    """Documents that a backend cannot keep apart."""
    if not need.documents:
        return None
    if not _KERNELS[backend].varlen:
        return "has no variable lengths, which data.mask_documents needs"
    if backend == "flash" and not capabilities.torch_varlen:
        return (
            f"has no causal variable lengths in PyTorch {capabilities.torch_version}, which "
            "data.mask_documents needs"
        )
    if backend == "flash" and need.dropout > 0:
        return "has no dropout with data.mask_documents"
    return None


def _cudnn_obstacle(need: Need, capabilities: Capabilities) -> str | None:
    """Versions of cuDNN with errors that would show."""
    cudnn = capabilities.cudnn_version
    if cudnn is None:
        return "is not there: this PyTorch has no cuDNN"
    if cudnn < 90000:
        return f"needs cuDNN 9, not {_cudnn_name(cudnn)}"
    if cudnn <= 91500 and need.sequence_length % 128 != 0:
        return (
            f"needs cuDNN 9.15.1 for lengths that 128 does not divide, and this is "
            f"{_cudnn_name(cudnn)}"
        )
    return None


def _describe(backend: str, capabilities: Capabilities) -> str:
    """Name, version and device of a chosen backend."""
    kernel = _KERNELS[backend]
    versions = {"cudnn": f"cuDNN {_cudnn_name(capabilities.cudnn_version or 0)}"}
    found = capabilities.versions.get(backend) or versions.get(backend)
    found = f" ({found})" if found is not None else ""
    if capabilities.device_type != "cuda":
        return f"{kernel.title}{found} on a CPU"
    return f"{kernel.title}{found} on compute capability {_dotted(capabilities)}"


def _major(capabilities: Capabilities) -> int:
    assert capabilities.compute_capability is not None, "a CUDA device has a compute capability"
    return capabilities.compute_capability[0]


def _dotted(capabilities: Capabilities) -> str:
    assert capabilities.compute_capability is not None, "a CUDA device has a compute capability"
    return "{}.{}".format(*capabilities.compute_capability)


def _cudnn_name(number: int) -> str:
    """9.15.1 for 91501."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
