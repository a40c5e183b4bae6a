"""What the device is, and what differs between a GPU and a CPU: the one place that asks.

Nothing here makes the host wait for a GPU, except `synchronize` and what says so.
"""

import os
import time

import torch
from torch import Tensor

from megaphi.process_memory import peak_memory


def is_gpu(device: torch.device) -> bool:
    """Whether it is a CUDA device."""
    return device.type == "cuda"


def device_of_process() -> torch.device:
    """The device on which this process computes: torchrun gives each process of a node a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def use(device: torch.device) -> None:
    """Make a GPU the current one of this thread."""
    if is_gpu(device):
        torch.cuda.set_device(device)


def device_name(device: torch.device) -> str:
    """The device's name as its maker spells it; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if is_gpu(device) else "cpu"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability, (9, 0) for H100 and H200; None for a CPU."""
    return torch.cuda.get_device_capability(device) if is_gpu(device) else None


def cuda_version() -> tuple[int, int] | None:
    """CUDA that PyTorch was built with; None without."""
    if torch.version.cuda is None:
        return None
    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    return major, minor


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator from which fused attention kernels of a GPU draw; a CPU has none."""
    if is_gpu(device):
        torch.cuda.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by PyTorch's allocator on a GPU, by the process on a CPU."""
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory() / 2**30


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; the copy to a GPU starts now, and its stream waits for it."""
    if not is_gpu(device):
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Numbers on their way from the device: the copy starts now, `values` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor.detach()
        if is_gpu(tensor.device):
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = pinned.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def values(self) -> list[float]:
        """The numbers, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._tensor.tolist()]


class StepTimer:
    """Seconds of each step, by CUDA events on a GPU and by the clock on a CPU.

    `start` marks where a step begins and `stop` where it ends; `seconds` reads the oldest step
    that was stopped, and waits for the device only if that step is still running.
    """

    def __init__(self, device: torch.device) -> None:
        self._use_events = is_gpu(device)
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
