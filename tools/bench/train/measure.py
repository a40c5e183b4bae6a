"""Warm up, time and profile steps: the same for our trainer and for its peers."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaphi.device import is_gpu, peak_memory_gib, synchronize
from tools.bench.train.profile import split_of_trace


def measure(
    step: Callable[[], Callable[[], float]],
    request: dict[str, Any],
    device: torch.device,
    read_seconds: Callable[[], float],
) -> dict[str, Any]:
    """Warm up, time and profile steps.

    Args:
        step: runs one, and returns a function that waits for its loss.
        request: `warmup_steps`, `steps` and `profile_steps`.
        device: where the steps run.
        read_seconds: duration of the oldest step that was not asked for yet.

    Returns:
        Losses and seconds of every timed step, seconds of all of them by the host's clock, of the
        first step, peak memory, and the profile.
    """

    def wait() -> None:
        synchronize(device)

    started = time.perf_counter()
    warmup_losses = [step()() for _ in range(request["warmup_steps"])]
    for _ in warmup_losses:
        read_seconds()
    wait()
    warmup_seconds, started = time.perf_counter() - started, time.perf_counter()
    losses = [step() for _ in range(request["steps"])]
    wait()
    seconds = time.perf_counter() - started
    result = {
        "warmup_losses": warmup_losses,
        "warmup_seconds": warmup_seconds,
        "losses": [loss() for loss in losses],
        "wall_seconds": seconds,
        "step_seconds": [read_seconds() for _ in losses],
        "peak_memory_gib": peak_memory_gib(device),
    }
    if is_gpu(device):
        result["reserved_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    if request["profile_steps"] > 0:
        result["profile"] = profile(step, request["profile_steps"], device)
    return result


def profile(
    step: Callable[[], Callable[[], float]], steps: int, device: torch.device
) -> dict[str, Any]:
    """Split some steps, after one that is not looked at, by kind of work."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if is_gpu(device):
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    # the profiler's own start slows the first steps under it
    with torch.profiler.profile(activities=kinds):
        step()()
    with torch.profiler.profile(activities=kinds) as profiler:
        losses = [step() for _ in range(steps)]
        for loss in losses:
            loss()
        synchronize(device)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return split_of_trace(path, steps)
