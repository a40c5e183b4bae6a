"""Times of a call on a device, and the two ceilings that they are held against.

On a GPU a call is timed twice over. `triton.testing.do_bench` gives what a caller sees, launches
included, with the L2 cache cleared in between. The second figure is the device's alone: a waiting
kernel holds the stream back until the host has enqueued the call, as in a training step, where the
host runs ahead; small operations are otherwise measured by how fast Python launches them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_HOLD_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to enqueue an operation
_CPU_SECONDS = 0.2


def summarize(milliseconds: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and every repeat."""
    ordered = sorted(milliseconds)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {
        "ms": statistics.median(ordered),
        "p20": at(0.2),
        "p80": at(0.8),
        "repeats_ms": [round(value, 6) for value in milliseconds],
    }


def time_call(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Time a call, in milliseconds.

    Returns:
        `summarize`'s keys, and `device_ms`: the median without launches; None on a CPU.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        repeats = do_bench(call, warmup=25, rep=100, return_mode="all")
        return {**summarize(repeats), "device_ms": _device_median(call, len(repeats))}
    call()
    repeats, started = [], time.perf_counter()
    while len(repeats) < 5 or time.perf_counter() - started < _CPU_SECONDS:
        before = time.perf_counter()
        call()
        repeats.append((time.perf_counter() - before) * 1e3)
    return {**summarize(repeats), "device_ms": None}


def _device_median(call: Callable[[], Any], repeats: int) -> float:
    """Median time between two events that the device meets with nothing left to wait for."""
    repeats = max(5, min(50, repeats))
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]  # type: ignore[no-untyped-call]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for begin, end in zip(begins, ends, strict=True):
        flush.zero_()
        torch.cuda._sleep(_HOLD_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = [float(b.elapsed_time(e)) for b, e in zip(begins, ends, strict=True)]
    return statistics.median(times)


def peak_memory_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """What a call adds to the memory in use at its peak; None where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gbps(device: torch.device) -> float:
    """GB/s of a copy within the device's memory, bytes read plus bytes written."""
    size = (1 << 31) if device.type == "cuda" else (1 << 26)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_call(lambda: target.copy_(source), device)
    return 2.0 * size / float(times["device_ms"] or times["ms"]) / 1e6


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product of random values."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = time_call(lambda: a @ b, device)
    return 2.0 * size**3 / float(times["device_ms"] or times["ms"]) / 1e9
