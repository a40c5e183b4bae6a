"""`megaphi preflight`: minutes of checks before days of training, on every process of the run.

Started as the run will be, `torchrun … -m megaphi preflight RECIPE`, or alone. All processes join
over gloo, compare what they are, measure their device, the all-reduce and the shared storage, and
reach one verdict. Exit status: 0 ready, 1 a check failed, 2 wrong call.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaphi.config import Precision, Recipe
from megaphi.errors import EXIT_FAILED, EXIT_OK
from megaphi.recipe_file import load_recipe
from tools.machine.preflight_measures import (
    describe_process,
    disk_facts,
    measure_all_reduce,
    measure_device,
    query_smi,
    unseen_probes,
    write_probe,
)

SLOW_SHARE = 0.9  # of the median; healthy GPUs of one model differ by two or three percent
MEMORY_IN_USE_GIB = 2.0  # our own CUDA context takes about half a GiB
CLOCK_SKEW_SECONDS = 5.0
VISIBLE_WITHIN_SECONDS = 90.0  # NFS may serve attributes from a cache for 60 s
LEAST_CAPABILITY = {"bf16": (8, 0), "fp16": (7, 0), "fp8": (8, 9)}
SAME = {"megaphi": "megaphi version", "torch": "torch version", "device": "device"}
MEASURES = {
    "tflops": "matrix product, TFLOP/s",
    "copy_gb_s": "memory copy, GB/s",
    "all_reduce_gb_s": "all-reduce, GB/s",
}


def main(argv: Sequence[str]) -> int:
    """Check, report on main, and return the verdict on every process.

    Raises:
        ValueError: the recipe or an option is wrong, or the batch does not divide.
        FileNotFoundError: the recipe file is missing.
    """
    parser = argparse.ArgumentParser(
        prog="megaphi preflight",
        usage="megaphi preflight [RECIPE] [--section.key=value …] [--out-dir DIR] [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out-dir", type=Path, help="shared directory (default: train.run_dir)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, words = parser.parse_known_args(list(argv))
    recipe = load_recipe(words) if words else None
    out_dir = options.out_dir or (Path(recipe.train.run_dir) if recipe is not None else None)
    with joined():
        report = examine(recipe, out_dir)
        if dist.get_rank() == 0:
            print(json.dumps(report) if options.json else render(report), flush=True)
    return EXIT_FAILED if report["failures"] else EXIT_OK


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, or be the only one.

    Over gloo even where there are GPUs: what is wrong with a GPU must not keep the processes from
    agreeing on it.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """One small object of every process, on all of them; also a barrier."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def examine(
    recipe: Recipe | None,
    out_dir: Path | None,
    *,
    free_bytes: int | None = None,
    visible_within: float = VISIBLE_WITHIN_SECONDS,
) -> dict[str, Any]:
    """Run every check; call it on all processes, inside `joined`.

    Args:
        recipe: what will be trained; without it precision, batch and disk are not checked.
        out_dir: directory that all processes must share; without it storage is not checked.
        free_bytes: free disk, instead of asking the file system.
        visible_within: seconds that a file may take to be seen by another process.

    Returns:
        `processes` (facts of each), `failures` and `notes` (one line each): the same everywhere.

    Raises:
        ValueError: the recipe's batch does not divide among the processes.
    """
    if recipe is not None:
        recipe.micro_batches(dist.get_world_size())
    gather(None)  # so that the clocks are read at one time
    skew = clock_skew(gather((os.uname().nodename, time.time())))
    facts = describe_process(dist.get_rank())
    everyone = gather(facts)
    failures = check_devices(everyone, None if recipe is None else recipe.precision)
    for key, what in SAME.items():
        failures += check_same(everyone, key, what)
    if skew > CLOCK_SKEW_SECONDS:
        failures.append(
            f"clocks of the nodes differ by {skew:.0f} s; start time synchronisation (chrony, ntp)"
        )
    notes: list[str] = []
    if failures:  # a missing GPU would only make the measurements fail with worse words
        notes.append("device and network were not measured because of the failures")
    else:
        everyone, slow = measure_everyone(facts)
        failures += check_health(everyone)
        on_gpu = everyone[0]["device"] != "CPU"
        # processes on CPUs share their cores with each other and whoever else is there
        (failures if on_gpu else notes).extend(slow)
    if out_dir is None:
        notes.append("storage was not checked: give a recipe or --out-dir")
    else:
        failures += check_storage(out_dir, everyone, visible_within)
        if recipe is not None:
            failures += check_disk(recipe, out_dir, everyone, free_bytes)
    return {"processes": everyone, "failures": failures, "notes": notes, "clock_skew_s": skew}


def measure_everyone(facts: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Facts of every process with its measurements, and a line for each slow one."""
    on_gpu = facts["device"] != "CPU"
    device = torch.device("cuda", facts["local_rank"]) if on_gpu else torch.device("cpu")
    facts |= measure_device(device)
    if on_gpu:  # while it is still warm: a slowdown ends when the load does
        facts |= query_smi().get(facts["uuid"], {})
    group = dist.new_group(backend="nccl") if on_gpu else None
    facts |= measure_all_reduce(device, group)
    everyone = gather(facts)
    lines = []
    for key, what in MEASURES.items():
        values = [process[key] for process in everyone]
        if None not in values:
            median = statistics.median(values)
            lines += [
                f"{place(everyone[index])}: {what} {values[index]:.4g}, the median is {median:.4g};"
                " find what else runs there, or take the GPU or its node out"
                for index in slow_ones(values)
            ]
    return everyone, lines


def place(process: dict[str, Any]) -> str:
    """Where a process runs, as people look for it."""
    return (
        f"rank {process['rank']} ({process['host']}, {process['device']} {process['local_rank']})"
    )


def slow_ones(values: Sequence[float]) -> list[int]:
    """Indices of the values below `SLOW_SHARE` of the median."""
    limit = SLOW_SHARE * statistics.median(values)
    return [index for index, value in enumerate(values) if value < limit]


def clock_skew(clocks: Sequence[tuple[str, float]]) -> float:
    """Seconds between the earliest and the latest clock; 0 on one host, which has one clock."""
    if len({host for host, _ in clocks}) == 1:
        return 0.0
    times = [seconds for _, seconds in clocks]
    return max(times) - min(times)


def check_same(everyone: Sequence[dict[str, Any]], key: str, what: str) -> list[str]:
    """A line for each process in which `key` is not what it is in most."""
    values = [process.get(key) for process in everyone]
    usual = statistics.mode(values)
    return [
        f"{place(process)}: {what} {value}, most have {usual}; use the same on every node"
        for process, value in zip(everyone, values, strict=True)
        if value != usual
    ]


def check_devices(everyone: Sequence[dict[str, Any]], precision: Precision | None) -> list[str]:
    """A line for each node with another number of GPUs than processes or the wrong kind of GPU."""
    lines = []
    for process in everyone:
        gpus, processes = process["gpus"], process["processes_on_node"]
        # alone, without torchrun, one process looks at one GPU of many
        unequal = gpus != processes if len(everyone) > 1 else gpus > 0 and gpus < processes
        if gpus and unequal and process["local_rank"] == 0:
            lines.append(
                f"{process['host']}: {gpus} GPU(s) for {processes} processes; "
                "start one process for each GPU (GPUS=…, or CUDA_VISIBLE_DEVICES)"
            )
        least = LEAST_CAPABILITY.get(precision.dtype) if precision is not None else None
        capability = process.get("capability")
        if least and capability and tuple(capability) < least:
            assert precision is not None
            lines.append(
                f"{place(process)}: precision.dtype={precision.dtype} needs compute capability "
                f"{least[0]}.{least[1]}, this is {capability[0]}.{capability[1]}; "
                f"use --precision.dtype={'bf16' if tuple(capability) >= (8, 0) else 'fp32'}"
            )
    return lines


def check_health(everyone: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each GPU that is used by others, slowed down or failing, and each wrong sum."""
    lines = check_same(everyone, "driver", "GPU driver")
    for process in everyone:
        if process.get("memory_in_use_gib", 0.0) > MEMORY_IN_USE_GIB:
            lines.append(
                f"{place(process)}: {process['memory_in_use_gib']:.1f} GiB of its memory are in "
                "use; `nvidia-smi` shows by which process: end it"
            )
        if process.get("slowdowns"):
            lines.append(
                f"{place(process)}: {', '.join(process['slowdowns'])}; check its cooling and "
                "power, take the node out"
            )
        if process.get("ecc_errors"):
            lines.append(
                f"{place(process)}: {process['ecc_errors']} uncorrected memory errors; reset or "
                "replace the GPU"
            )
        if not process["sums_right"]:
            lines.append(
                f"{place(process)}: an all-reduce of integers gave a wrong sum; its GPU, link or "
                "network adapter corrupts data: take the node out"
            )
    return lines


def check_storage(
    out_dir: Path, everyone: Sequence[dict[str, Any]], visible_within: float
) -> list[str]:
    """A line for each process whose storage lacks rename and fsync or does not show all files."""
    rank, size = dist.get_rank(), dist.get_world_size()
    token = str(gather(uuid.uuid4().hex)[0])
    problems = gather(write_probe(out_dir, token, rank))
    lines = [
        f"{place(everyone[number])}: {problem}; train.run_dir must be a writable directory"
        for number, problem in enumerate(problems)
        if problem is not None
    ]
    if not lines:
        unseen = gather((unseen_probes(out_dir, token, size, visible_within), str(out_dir)))
        lines = [
            f"{place(everyone[number])}: does not see the files of rank(s) "
            f"{', '.join(map(str, missing))} in {seen_there} within {visible_within:.0f} s; "
            "train.run_dir must be one directory that all nodes share"
            for number, (missing, seen_there) in enumerate(unseen)
            if missing
        ]
    # where it is not shared, each process has a folder of its own to clean
    shutil.rmtree(out_dir / f".preflight-{token}", ignore_errors=True)
    return lines


def check_disk(
    recipe: Recipe, out_dir: Path, everyone: Sequence[dict[str, Any]], free_bytes: int | None
) -> list[str]:
    """A line if the checkpoints will not fit, as the fullest process's disk says."""
    facts = disk_facts(recipe, out_dir, free_bytes) if out_dir.is_dir() else None
    known = [
        (disk["free_bytes"], number, disk["needed_bytes"])
        for number, disk in enumerate(gather(facts))
        if disk is not None
    ]
    free, number, needed = min(known, default=(0, 0, 0))
    if free >= needed:
        return []
    return [
        f"{place(everyone[number])}: {out_dir} has {free / 1e9:.1f} GB free, the run's checkpoints "
        f"need {needed / 1e9:.1f} GB; free some, or lower checkpoint.keep or raise "
        "checkpoint.permanent_interval"
    ]


def render(report: dict[str, Any]) -> str:
    """The report as a table and lines of text."""
    rows = [("rank", "host", "device", "TFLOP/s", "copy GB/s", "all-reduce GB/s")]
    for process in report["processes"]:
        numbers = (process.get(key) for key in MEASURES)
        shown = ("n/a" if number is None else f"{number:.4g}" for number in numbers)
        device = f"{process['device']} {process['local_rank']}"
        rows.append((str(process["rank"]), process["host"], device, *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"note: {line}" for line in report["notes"]]
    lines += [f"FAILED: {line}" for line in report["failures"]]
    verdict = f"{len(report['failures'])} check(s) failed" if report["failures"] else "ready"
    return "\n".join([*lines, f"preflight: {verdict}"])
