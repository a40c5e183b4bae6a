"""How long steps take and what they gave, read without making the device wait."""

import time

import torch
from torch import Tensor

from megaphi.metrics.memory import peak_memory


class StepTimer:
    """Seconds of each step, by CUDA events on a GPU and by the clock on a CPU.

    `start` marks where a step begins and `stop` where it ends; `seconds` reads the oldest step
    that was stopped, and waits for the device only if that step is still running.
    """

    def __init__(self, device: torch.device) -> None:
        self._use_events = device.type == "cuda"
        self._started: float | torch.cuda.Event = 0.0
        self._stopped: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def _now(self) -> "float | torch.cuda.Event":
        """The present point in time, on the device where there is one."""
        if not self._use_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """Mark the beginning of a step."""
        self._started = self._now()

    def stop(self) -> None:
        """Mark the end of the step that was started last."""
        self._stopped.append((self._started, self._now()))

    def seconds(self) -> float:
        """Duration of the oldest step not yet read."""
        begin, end = self._stopped.pop(0)
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000.0
        assert not isinstance(end, torch.cuda.Event)
        return end - begin


class Later:
    """Numbers on their way from the device: the copy starts now, `values` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor.detach()
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = pinned.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def values(self) -> list[float]:
        """The numbers, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._tensor.tolist()]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by PyTorch's allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory() / 2**30


def device_name(device: torch.device) -> str:
    """The device's name as its maker spells it; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
