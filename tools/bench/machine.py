"""What is reported with a figure: machine, versions, commit; and child processes to measure in."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megaphi import __version__

ROOT = Path(__file__).resolve().parent.parent.parent


_DATA_PACKAGES = ("numpy", "torch", "tokenizers", "gigatoken", "megatron-core", "datatrove")


_GPU_PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "flash-attn-4",
    "transformer-engine",
)


def describe_machine(
    command: Sequence[str], packages: Sequence[str] = _DATA_PACKAGES
) -> dict[str, Any]:
    """What the figures depend on besides the code; None where it cannot be found out."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "megaphi": __version__,
        "commit": git_commit(ROOT),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in packages},
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, str]]:
    """Name, driver, memory, capability and clocks of each GPU, as nvidia-smi tells them.

    Asking torch would take up memory of the GPU that is about to be measured.
    """
    fields = ("name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    if done.returncode != 0:
        return []
    lines = (line.split(", ") for line in done.stdout.splitlines())
    return [dict(zip(fields, line, strict=False)) for line in lines]


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine in the head of a table."""
    loads = " to ".join(f"{machine[key][0]:.1f}" for key in ("load_before", "load_after"))
    packages = ", ".join(
        f"{name} {v or 'not installed'}" for name, v in machine["packages"].items()
    )
    return [
        f"{machine['command']}    {machine['date']}",
        f"megaphi {machine['megaphi']}, commit {machine['commit'] or 'unknown'}",
        f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load average {loads}",
        *(
            f"{gpu['name']}, {gpu['memory.total']}, capability {gpu['compute_cap']}, "
            f"driver {gpu['driver_version']}"
            for gpu in machine["gpus"]
        ),
        f"Python {machine['python']}, {packages}",
    ]


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """The CPU's name as its maker spells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def git_commit(root: Path) -> str | None:
    """Commit of a checkout, with `-dirty` if tracked files were changed; None outside of git.

    Only `root` itself is asked: an installed package must not report the project around it.
    """
    if not (root / ".git").exists():
        return None
    # without optional locks a benchmark cannot get in the way of a commit
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always"]
    options = ["--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def child_environment() -> dict[str, str]:
    """Environment of a measuring process: it imports this very code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def run_child(module: str, request: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m module request`; what it prints is returned."""
    command = [sys.executable, "-m", module, str(request)]
    return subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
