"""Which number formats the compute runs in, decided once from the recipe and the device.

What a device can do is a pure function of a few facts about it, so that every case can be tested
without the device.
"""

import importlib.metadata
from dataclasses import dataclass
from typing import Literal

import torch

from megaphi.config import Precision
from megaphi.device import compute_capability, cpu_has_bf16, cuda_version, device_name, is_gpu

FP8_CUDA_VERSIONS = (((8, 9), (12, 1)), ((9, 0), (11, 8)), ((10, 0), (12, 8)))
"""Compute capability from which, and the first CUDA version with FP8 products for it."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the choice depends on."""

    name: str
    """As the vendor calls it, or CPU."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for a CPU."""
    cuda: tuple[int, int] | None = None
    """CUDA version of PyTorch."""
    transformer_engine: str | None = None
    """Version of Transformer Engine; None where it is not installed."""
    cpu_has_bf16: bool = False
    """Whether the CPU multiplies bf16 natively."""

    @property
    def native_bf16(self) -> bool:
        """Whether bf16 matrix products run in hardware."""
        return self.cpu_has_bf16 if self.capability is None else self.capability >= (8, 0)

    @property
    def description(self) -> str:
        """Name and compute capability, for messages."""
        if self.capability is None:
            return f"a {self.name}"
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class Policy:
    """The number formats of a run."""

    compute_dtype: torch.dtype
    """Of gathered weights and activations, also around FP8 products."""
    fp8: Literal["native", "te"] | None
    """What multiplies in FP8: our layers, Transformer Engine, or nothing."""
    loss_scaling: bool
    """Whether the loss must be scaled for the gradients not to vanish."""
    reason: str
    """The choice and why, for the log."""


def facts_of(device: torch.device) -> DeviceFacts:
    """Ask PyTorch and the installed packages about a device."""
    try:
        transformer_engine = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        transformer_engine = None
    if not is_gpu(device):
        return DeviceFacts(
            name="CPU",
            transformer_engine=transformer_engine,
            cpu_has_bf16=cpu_has_bf16(),
        )
    return DeviceFacts(
        name=device_name(device),
        capability=compute_capability(device),
        cuda=cuda_version(),
        transformer_engine=transformer_engine,
    )


def why_not_fp8(facts: DeviceFacts) -> str | None:
    """What a device lacks for FP8 products, as a sentence; None where it has them."""
    if facts.capability is None or facts.capability < FP8_CUDA_VERSIONS[0][0]:
        return (
            "FP8 needs compute capability >= 8.9 (Ada/Hopper/Blackwell); "
            f"this device is {facts.description}"
        )
    needed = [cuda for capability, cuda in FP8_CUDA_VERSIONS if facts.capability >= capability][-1]
    if facts.cuda is None or facts.cuda < needed:
        found = "without CUDA" if facts.cuda is None else "with CUDA {}.{}".format(*facts.cuda)
        return (
            f"FP8 on {facts.description} needs CUDA >= {needed[0]}.{needed[1]}; "
            f"PyTorch was built {found}"
        )
    return None


def resolve(precision: Precision, facts: DeviceFacts) -> Policy:
    """Choose the number formats of a run.

    Raises:
        ValueError: the device or the installation cannot do what was asked for.
    """
    wanted = precision.dtype
    if wanted in ("fp8", "fp8-auto"):
        missing = why_not_fp8(facts)
        if missing is None:
            return _with_fp8(precision, facts)
        if wanted == "fp8":
            instead = _instead_of_bf16(facts) or "bf16"
            raise ValueError(
                f"{missing}. Use precision.dtype={instead}, or precision.dtype=fp8-auto to fall "
                "back."
                if instead == "bf16"
                else f"{missing}. Use precision.dtype={instead}."
            )
        _require_bf16(wanted, facts)
        return Policy(torch.bfloat16, None, False, f"bf16, not fp8: {missing}")
    if wanted == "auto":
        chosen, has = ("bf16", "multiplies") if facts.native_bf16 else ("fp32", "does not multiply")
        dtype = torch.bfloat16 if facts.native_bf16 else torch.float32
        return Policy(dtype, None, False, f"{chosen}: {facts.description} {has} bf16 in hardware")
    if wanted == "bf16":
        _require_bf16(wanted, facts)
        return Policy(torch.bfloat16, None, False, "bf16: precision.dtype")
    if wanted == "fp16":
        if facts.capability is not None and facts.capability < (5, 3):
            raise ValueError(
                "precision.dtype=fp16 needs compute capability 5.3 or higher, this is "
                f"{facts.description}; use precision.dtype=fp32"
            )
        return Policy(torch.float16, None, True, "fp16 with a loss scale: precision.dtype")
    return Policy(torch.float32, None, False, "fp32: precision.dtype")


def _with_fp8(precision: Precision, facts: DeviceFacts) -> Policy:
    """FP8 on a device that has it.

    Raises:
        ValueError: Transformer Engine was asked for and is not installed.
    """
    where = f"on {facts.description}, {precision.fp8_scaling} scaling"
    if precision.fp8_backend != "te":
        return Policy(
            torch.bfloat16, "native", False, f"fp8 by torch._scaled_mm {where}, bf16 around it"
        )
    if facts.transformer_engine is None:
        raise ValueError(
            "precision.fp8_backend=te needs Transformer Engine, which is not installed: pip "
            "install --no-build-isolation transformer_engine[pytorch], or use "
            "precision.fp8_backend=native"
        )
    version = facts.transformer_engine
    return Policy(
        torch.bfloat16, "te", False, f"fp8 by Transformer Engine {version} {where}, bf16 around it"
    )


def _instead_of_bf16(facts: DeviceFacts) -> str | None:
    """What to advise where a GPU has no bf16; None where bf16 runs."""
    if facts.capability is None or facts.capability >= (8, 0):
        return None
    return "fp16" if facts.capability >= (5, 3) else "fp32"


def _require_bf16(wanted: str, facts: DeviceFacts) -> None:
    """Refuse a GPU without bf16; a CPU computes it in any case, if slowly.

    Raises:
        ValueError: names the device and what to use.
    """
    instead = _instead_of_bf16(facts)
    if instead is not None:
        raise ValueError(
            f"precision.dtype={wanted} needs compute capability 8.0 or higher, this is "
            f"{facts.description}; use precision.dtype={instead}"
        )


def check_pipeline(policy: Policy, precision: Precision) -> None:
    """Refuse what does not work where the model is cut into stages of a pipeline.

    A stage runs forward and backward passes of many micro-batches in turn, so nothing encloses a
    forward pass of the model, as Transformer Engine needs. Delayed scaling numbers the layers of a
    process and takes maxima over processes, which in a pipeline have different layers.

    Raises:
        ValueError: FP8 by Transformer Engine, or with delayed scaling.
    """
    if policy.fp8 == "te":
        raise ValueError(
            "precision.fp8_backend=te does not work with parallel.pipeline above 1; use "
            "precision.fp8_backend=native"
        )
    if policy.fp8 is not None and precision.fp8_scaling == "delayed":
        raise ValueError(
            "precision.fp8_scaling=delayed does not work with parallel.pipeline above 1; use "
            "precision.fp8_scaling=current"
        )
