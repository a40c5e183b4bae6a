"""`megaphi bench kernels`: every operation of the training step against what else could run it.

Each implementation's results and gradients are compared with the plain definition in fp32 before it
is timed; one that fails, is missing or is wrong is a row with the reason. The competitor of a
Triton kernel is torch.compile of its plain twin, and it is the device's time that decides: in a
step the host runs ahead of the device.
"""

import argparse
import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from tools.bench.kernels.cases import (
    CASES,
    Case,
    Function,
    Inputs,
    Sizes,
    full_sizes,
    small_sizes,
)
from tools.bench.kernels.table import MUST_BE_RIGHT, table, verdict
from tools.bench.kernels.timing import copy_gbps, matmul_tflops, peak_memory_mib, time_call
from tools.bench.kernels.variants import VARIANTS, Variant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# relative errors in the norm against fp32: above, a result is wrong and its time means nothing
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def run_kernels(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measure every operation.

    Returns:
        The report and its table; `failed` of the report names results of ours that are wrong.

    Raises:
        ValueError: an option has no such value.
    """
    deadline = time.monotonic() + options.seconds
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # a CPU sums gradients of 16-bit LayerNorms in 16 bits: its definitions would not be exact
    dtype = options.dtype or ("bf16" if cuda else "fp32")
    full = cuda and not options.quick
    rows = options.rows or (16384 if full else 64)
    if full and rows % 2048 != 0:
        raise ValueError(f"--rows {rows}: must be a multiple of 2048, the tokens of a sequence")
    cases = _chosen(options.operations)
    sizes = full_sizes(rows, torch.cuda.mem_get_info()[0]) if full else small_sizes(rows)
    torch.manual_seed(1234)
    ceilings = {"copy_gbps": copy_gbps(device)}
    ceilings |= {"matmul_tflops": matmul_tflops(device, DTYPES[dtype])}
    groups = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        chosen = [v for v in VARIANTS if v.case == case.name] if options.tune else []
        names = options.providers and options.providers.split(",")
        names = list(providers_of(case, device)) if names is None else names
        groups.append(measure_case(case, sizes, dtype, device, ceilings, names, chosen, deadline))
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    report = {
        "settings": {
            "dtype": dtype,
            "device": device.type,
            "shapes": "phi-1" if full else "small",
            "rows": sizes.rows,
            "optimizer_parameters": sizes.parameters,
            "tune": options.tune,
        },
        "ceilings": ceilings,
        "groups": groups,
        "without_case": operations_without_case(),
        "failed": [
            f"{group['name']}: {row['provider']}: {row['problem']}"
            for group in groups
            for row in group["rows"]
            if row.get("wrong") and row["provider"] in MUST_BE_RIGHT
        ],
    }
    return report, table(report)


def _chosen(names: str | None) -> list[Case]:
    """The cases of a comma-separated list; all without one."""
    if names is None:
        return list(CASES)
    known = {case.name for case in CASES} | {case.function for case in CASES}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"--operations {name}: must be one of {', '.join(sorted(known))}")
    return [c for c in CASES if {c.name, c.function} & set(names.split(","))]


def operations_with_kernel() -> set[str]:
    """Operations of the model with a choice of implementation; the others are plain PyTorch."""
    return {name for name in ops.__all__ if hasattr(getattr(ops, name), "__wrapped__")}


def operations_without_case() -> list[str]:
    """Operations with a kernel that nothing here measures."""
    return sorted(operations_with_kernel() - {case.function for case in CASES})


def plain_twin(case: Case) -> Function:
    """The operation's plain definition."""
    module = importlib.import_module(f"kernels.{case.definitions}")
    found: Function = getattr(module, case.function)
    return found


def providers_of(case: Case, device: torch.device) -> dict[str, Callable[[], Function]]:
    """Everything that could run a case, by name; each is made when it is its turn."""
    plain = plain_twin(case)

    def triton() -> Function:
        if device.type != "cuda":
            raise Missing("needs a GPU")
        found: Function = getattr(importlib.import_module(f"kernels.{case.file}"), case.function)
        return found

    def compiled() -> Function:
        torch._dynamo.reset()
        return torch.compile(plain, dynamic=False)

    return {"eager": lambda: plain, "compile": compiled, "triton": triton, **case.peers}


class Missing(Exception):
    """An implementation cannot run here; the message says why."""


def measure_case(
    case: Case,
    sizes: Sizes,
    dtype_name: str,
    device: torch.device,
    ceilings: dict[str, float],
    names: list[str],
    variants: list[Variant],
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """The named implementations of one operation, verified and timed.

    Those whose turn comes after `deadline` (of `time.monotonic`) are left out.
    """
    dtype = case.dtype or DTYPES[dtype_name]
    inputs = case.inputs(sizes, dtype, device)
    exact, gradients = expected(case, inputs)
    floors = floors_ms(case, sizes, dtype, ceilings)
    providers = providers_of(case, device)
    rows = []

    def add(name: str, make: Callable[[], Function]) -> None:
        row: dict[str, Any] = {"provider": name}
        try:
            if time.monotonic() > deadline:
                raise Missing("no time left")
            function = make()
            row["error"] = worst_error(results(case, function, inputs.copy(), gradients), exact)
            if not row["error"] <= LIMITS[dtype]:
                row["wrong"] = True
                row["problem"] = f"wrong: relative error {row['error']:.2g}"
            else:
                row |= _times(case, function, inputs, gradients, device, floors)
        except ModuleNotFoundError as error:
            row["problem"] = f"not installed: {error.name}"
        except (Missing, ValueError) as error:  # it says that it cannot run here
            row["problem"] = " ".join(str(error).split())
        except Exception as error:  # whatever another library raises is its row
            row["problem"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            row["wrong"] = True
        rows.append(row)

    for name, make in providers.items():
        if name in names:
            add(name, make)
    for variant in variants if device.type == "cuda" else []:
        with changed(variant):
            add(f"triton, {variant.label}", providers["triton"])
    return {
        "name": case.name,
        "function": case.function,
        "dtype": str(dtype).removeprefix("torch."),
        "floors_ms": floors,
        "rows": rows,
        "verdict": verdict(rows),
    }


@contextlib.contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """The launch settings of a variant, for a while."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for module_name, values in variant.settings.items():
            module = importlib.import_module(f"kernels.{module_name}")
            for name, value in values.items():
                before.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Produced(torch.autograd.Function):
    """A tensor that an operation before has just made, without the cost of making it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        """Memory of `leaf` under a tensor with a history, which may be written over."""
        return torch.empty(0, dtype=leaf.dtype, device=leaf.device).set_(leaf.detach())  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Pass the gradient on."""
        return grad


def call(case: Case, function: Function, inputs: Inputs) -> list[Tensor]:
    """Run the forward pass; the results."""
    args = list(inputs.args)
    if case.overwrites:
        args[0] = _Produced.apply(args[0])  # type: ignore[no-untyped-call]
    returned = function(*args, **inputs.kwargs)
    if case.in_place:
        changed = [inputs.args[index] for index in case.in_place]
        return [t for one in changed for t in (one if isinstance(one, list) else [one])]
    return list(returned) if isinstance(returned, tuple) else [returned]


def results(
    case: Case, function: Function, inputs: Inputs, gradients: list[Tensor]
) -> list[Tensor]:
    """Results of the forward pass and gradients of all leaves."""
    outputs = call(case, function, inputs)
    leaves = inputs.leaves()
    if not leaves:
        return case.comparable(outputs)
    # cloned: an implementation may write over the gradient it is given
    given = [
        gradient.to(o.dtype, copy=True) for gradient, o in zip(gradients, outputs, strict=True)
    ]
    found = torch.autograd.grad(outputs, leaves, given)
    return [*(output.detach() for output in outputs), *found]


def expected(case: Case, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """What the plain definition gives in fp32, and the gradients that flow into it."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()

    plain = plain_twin(case)
    wide = inputs.copy(widened)
    if not wide.leaves():
        return results(case, plain, wide, []), []
    dtype = inputs.leaves()[0].dtype
    outputs = call(case, plain, wide)
    # a loss has a gradient of one; others random ones, the same for everybody
    gradients = [
        torch.randn_like(o).to(dtype) if o.dim() > 0 else torch.ones_like(o) for o in outputs
    ]
    found = torch.autograd.grad(
        outputs, wide.leaves(), [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    )
    return [*(output.detach() for output in outputs), *found], gradients


def worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest norm of a difference over the norm of what was expected; NaN stays NaN."""
    errors = []
    for ours, right in zip(found, exact, strict=True):
        norm = right.double().norm() if right.device.type == "cpu" else right.float().norm()
        difference = (ours.float() - right.float()).norm()
        errors.append(float(difference / norm) if norm > 0 else float(difference))
    return next((e for e in errors if e != e), max(errors))


def floors_ms(
    case: Case, sizes: Sizes, dtype: torch.dtype, ceilings: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Bytes, FLOPs and the least time of the forward pass, and of both passes."""

    def floor(moved: float, flops: float) -> dict[str, float]:
        by_copy = moved / ceilings["copy_gbps"] / 1e6
        by_matmul = flops / ceilings["matmul_tflops"] / 1e9
        return {"bytes": moved, "flops": flops, "ms": max(by_copy, by_matmul)}

    size = dtype.itemsize
    moved, flops = case.forward_bytes(sizes, size), case.forward_flops(sizes)
    floors = {"forward": floor(moved, flops)}
    if case.backward_bytes is not None:
        moved, flops = (
            moved + case.backward_bytes(sizes, size),
            flops + case.backward_flops(sizes),
        )
        floors["both"] = floor(moved, flops)
    return floors


def _times(
    case: Case,
    function: Function,
    inputs: Inputs,
    gradients: list[Tensor],
    device: torch.device,
    floors: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Times, rates and peak memory of both passes of a verified implementation.

    Forward is the forward pass of a training, which keeps what backward needs; `backward_ms` is
    what both passes take more, so that kernels that make gradients early are charged fairly.
    """

    def forward() -> list[Tensor]:
        return call(case, function, inputs)

    leaves = inputs.leaves()
    own = inputs.copy() if case.in_place or case.overwrites else inputs
    inputs, leaves = own, own.leaves()
    given = None

    def both() -> Any:
        outputs = call(case, function, inputs)
        return torch.autograd.grad(outputs, leaves, given)

    passes: dict[str, Callable[[], Any]] = {"forward": forward}
    if leaves:
        given = [
            g.to(o.dtype, copy=True)
            for g, o in zip(gradients, call(case, function, inputs), strict=True)
        ]
        passes["both"] = both
    found: dict[str, Any] = {"passes": {}}
    for name, run in passes.items():
        entry = time_call(run, device)
        decisive = entry["device_ms"] or entry["ms"]
        entry["gbps"] = floors[name]["bytes"] / decisive / 1e6
        entry["share"] = floors[name]["ms"] / decisive
        if floors[name]["flops"]:
            entry["tflops"] = floors[name]["flops"] / decisive / 1e9
        found["passes"][name] = entry
    found["peak_mib"] = peak_memory_mib(passes.get("both", forward), device)
    return found
