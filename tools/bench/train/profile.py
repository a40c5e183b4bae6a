"""Where the time of a training step goes: device events by what kind of work they are.

The kind is told from a kernel's name: that is all a profiler knows, and it is the same for our
kernels, PyTorch's, the libraries' and those that torch.compile makes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CATEGORIES = (
    "GEMM",
    "attention",
    "elementwise+norm",
    "optimizer",
    "copies+cast",
    "communication",
    "idle",
)

# Tried in order, in lower case. Attention before GEMM: flash-attn's kernels are CUTLASS templates.
# What torch.compile fuses carries the names of all its parts, so it comes before the copies.
_PATTERNS = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|\bc10d|gloo"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    (
        "copies+cast",
        r"triton_\w*_fused(_*(_to_copy|clone|copy_?|cat|view|t|transpose|permute))+_\d+",
    ),
    ("GEMM", r"triton_tem_"),
    ("elementwise+norm", r"^triton_"),
    ("copies+cast", r"copyfunctor|chunk_cat|split_with_sizes"),
    ("optimizer", r"adam|sum_of_squares|multi_tensor|foreach|lpnorm"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|wgmma|s16816|scaled_mm|::(add)?b?mm\b"),
    ("GEMM", r"\b(mkldnn|onednn).*(linear|matmul)|::linear\b|::matmul\b"),
    ("copies+cast", r"memcpy|memset|copy|\bfill|fillfunctor|catarray|cast|amax|transpose|quantize"),
    ("copies+cast", r"^scale_kernel|fp8"),  # the largest value, from which FP8 takes its scale
    ("copies+cast", r"::(cat|clone|to|contiguous|zero_|zeros|empty\w*)\b"),
)


class Event(NamedTuple):
    """A kernel, copy or fill on the device; times in microseconds."""

    name: str
    start: float
    duration: float


def category(name: str) -> str:
    """The kind of work that a kernel of this name does."""
    lower = name.lower()
    for kind, pattern in _PATTERNS:
        if re.search(pattern, lower):
            return kind
    return "elementwise+norm"


def device_events(trace: dict[str, Any]) -> list[Event]:
    """The work on the GPU in a trace of torch.profiler, without the ranges that annotate it."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Event(entry["name"], float(entry["ts"]), float(entry["dur"]))
        for entry in trace["traceEvents"]
        if entry.get("ph") == "X" and entry.get("cat") in wanted
    ]


def host_events(trace: dict[str, Any]) -> list[Event]:
    """Operators on the CPU, each with its own time: what those inside of it take is taken off."""
    found = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    found.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    own = [float(entry["dur"]) for entry in found]
    open_now: list[int] = []
    for index, entry in enumerate(found):
        while open_now and (
            found[open_now[-1]]["tid"] != entry["tid"]
            or found[open_now[-1]]["ts"] + found[open_now[-1]]["dur"] <= entry["ts"]
        ):
            open_now.pop()
        if open_now:
            own[open_now[-1]] -= float(entry["dur"])
        open_now.append(index)
    return [Event(e["name"], float(e["ts"]), max(0.0, t)) for e, t in zip(found, own, strict=True)]


def busy_time(events: Iterable[Event]) -> float:
    """Microseconds in which at least one event runs."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        stop = event.start + event.duration
        total += max(0.0, stop - max(event.start, end))
        end = max(end, stop)
    return total


def split(events: list[Event], span: float, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kind of work.

    Args:
        events: what ran on the device.
        span: microseconds from the first to the last, idle time included.
        steps: training steps in it.

    Returns:
        `ms` by category, where streams that overlap count twice and `idle` is when nothing ran;
        and the `top` kernels: name, category, milliseconds and calls a step.
    """
    times: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        times[category(event.name)] += event.duration  # type: ignore[assignment]
        by_name[event.name] += event.duration  # type: ignore[assignment]
        calls[event.name] += 1
    times["idle"] = max(0.0, span - busy_time(events))  # type: ignore[assignment]
    top = [
        {
            "name": name[:160],
            "category": category(name),
            "ms": duration / steps / 1e3,
            "calls": calls[name] / steps,
        }
        for name, duration in by_name.most_common(25)
    ]
    return {"ms": {kind: times[kind] / steps / 1e3 for kind in CATEGORIES}, "top": top}


def split_of_trace(path: Path, steps: int) -> dict[str, Any]:
    """The split of a trace file: of the GPU's work where there is any, else of the CPU's."""
    trace = json.loads(path.read_bytes())
    events = device_events(trace)
    if events:
        span = max(e.start + e.duration for e in events) - min(e.start for e in events)
        return {"of": "GPU kernels", **split(events, span, steps)}
    operators = host_events(trace)
    # own times of operators do not lie end to end, so there is no idle time to be had from them
    return {"of": "CPU operators", **split(operators, 0.0, steps)}
