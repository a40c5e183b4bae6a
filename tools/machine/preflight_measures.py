"""What `megaphi preflight` measures on one process: its GPU, the network, the storage.

Timings are for comparing processes with each other, not for publishing: a few hundred milliseconds
each. Nothing here decides whether a run may start; `tools.machine.preflight` does.
"""

import csv
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaphi import __version__
from megaphi.config import Recipe
from megaphi.durable import sync, write_durably
from megaphi.formats.manifest import find_checkpoints
from megaphi.model.phi import num_parameters

# Names of a field in newer and older drivers; the first set that nvidia-smi accepts is used.
SMI_FIELDS = (
    "uuid,driver_version,clocks_event_reasons.active,ecc.errors.uncorrected.volatile.total",
    "uuid,driver_version,clocks_throttle_reasons.active,ecc.errors.uncorrected.volatile.total",
)
# Bits of the clock event reasons that mean a fault of cooling or power supply (NVML,
# nvmlClocksEventReasons). The software power cap, 0x4, is usual under load and is not among them.
SLOWDOWN_BITS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weight and two fp32 moments


def parse_smi(text: str) -> dict[str, dict[str, Any]]:
    """Read the CSV (no header, no units) that nvidia-smi prints for `SMI_FIELDS`.

    Returns:
        For each GPU's uuid: `driver`, `slowdowns` (names of the active reasons) and `ecc_errors`
        (uncorrected since the driver was loaded; None where the GPU has no ECC).
    """
    found = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != 4:
            continue
        uuid, driver, reasons, errors = row
        bits = int(reasons, 16) if reasons.startswith("0x") else 0
        found[uuid.removeprefix("GPU-")] = {
            "driver": driver,
            "slowdowns": [name for bit, name in SLOWDOWN_BITS.items() if bits & bit],
            "ecc_errors": int(errors) if errors.isdigit() else None,
        }
    return found


def query_smi() -> dict[str, dict[str, Any]]:
    """`parse_smi` of this machine; empty where there is no nvidia-smi or it knows no such field."""
    if shutil.which("nvidia-smi") is None:
        return {}
    for fields in SMI_FIELDS:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 0:
            return parse_smi(done.stdout)
    return {}


def describe_process(rank: int) -> dict[str, Any]:
    """Who this process is and what it sees, without touching a GPU's memory."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    facts: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "local_rank": local_rank,
        "processes_on_node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "megaphi": __version__,
        "device": "CPU",
    }
    if local_rank < facts["gpus"]:
        properties = torch.cuda.get_device_properties(local_rank)
        facts["device"] = properties.name
        facts["capability"] = [properties.major, properties.minor]
        facts["uuid"] = str(properties.uuid)
    return facts


def _seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Best of `rounds` timings of `work`, after two that warm up.

    The best, because anything else on the machine can only make a round slower.
    """
    best = float("inf")
    for number in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            best = min(best, time.perf_counter() - started)
    return best


def measure_device(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a matrix product (bf16 on a GPU, fp32 on a CPU), GB/s of a copy, memory in use."""
    facts: dict[str, Any] = {}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
        facts["memory_in_use_gib"] = (total - free) / 2**30
        facts["memory_total_gib"] = total / 2**30
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    # a GPU takes some tenths of a second of load before its clocks and its slowdowns show
    seconds = _seconds(lambda: torch.mm(left, right, out=product), device, 60 if on_gpu else 5)
    facts["tflops"] = 2 * size**3 / seconds / 1e12
    num_bytes = 2**30 if on_gpu else 2**24
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device, 10 if on_gpu else 3)
    facts["copy_gb_s"] = 2 * num_bytes / seconds / 1e9
    return facts


def measure_all_reduce(device: torch.device, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Whether sums of integers come out right, and the bus bandwidth of a large all-reduce.

    Bus bandwidth is 2 (n - 1) / n x bytes / seconds, as nccl-tests defines it; with one process it
    is None.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    numbers = torch.arange(4096, device=device, dtype=torch.int64) * (rank + 1)
    dist.all_reduce(numbers, group=group)
    expected = torch.arange(4096, dtype=torch.int64) * (size * (size + 1) // 2)
    facts: dict[str, Any] = {"sums_right": torch.equal(numbers.cpu(), expected)}
    facts["all_reduce_gb_s"] = None
    if size > 1:
        num_bytes = 2**28 if device.type == "cuda" else 2**22
        block = torch.zeros(num_bytes // 4, device=device, dtype=torch.float32)
        seconds = _seconds(lambda: dist.all_reduce(block, group=group), device, 5)
        facts["all_reduce_gb_s"] = 2 * (size - 1) / size * num_bytes / seconds / 1e9
    return facts


def write_probe(directory: Path, token: str, rank: int) -> str | None:
    """Write this process's file into the shared directory the way a checkpoint is published.

    Returns:
        What the storage cannot do, or None.
    """
    try:
        folder = directory / f".preflight-{token}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}"
        path.write_text("old", encoding="utf-8")
        write_durably(path, token)  # fsync, rename over the old file, fsync of the folder
        if path.read_text(encoding="utf-8") != token:
            return f"{path} still has its old content after a rename"
        moved = folder / f"rank-{rank}.directory"
        (folder / f"rank-{rank}.tmp").mkdir()
        (folder / f"rank-{rank}.tmp").rename(moved)
        sync(folder)
    except OSError as error:
        return f"{directory} does not take a run's files: {error}"
    return None


def unseen_probes(directory: Path, token: str, size: int, within: float) -> list[int]:
    """Ranks whose file does not become visible here within so many seconds."""
    folder = directory / f".preflight-{token}"
    waiting = list(range(size))
    deadline = time.monotonic() + within
    while True:
        waiting = [rank for rank in waiting if not _holds(folder / f"rank-{rank}", token)]
        if not waiting or time.monotonic() > deadline:
            return waiting
        time.sleep(0.1)


def _holds(path: Path, token: str) -> bool:
    """Whether a file is there and has this content."""
    try:
        return path.read_text(encoding="utf-8") == token
    except OSError:
        return False


def checkpoint_bytes(recipe: Recipe, existing: int) -> int:
    """Disk that the checkpoints still to be written need at most, with a tenth to spare.

    Args:
        recipe: `keep` checkpoints stay, one more is written before an old one goes, and those at
            multiples of `permanent_interval` stay as well.
        existing: checkpoints that already lie there; their disk is not free any more.
    """
    permanent = recipe.checkpoint.permanent_interval
    planned = recipe.checkpoint.keep + 1 + (recipe.train.steps // permanent if permanent else 0)
    one = CHECKPOINT_BYTES_PER_PARAMETER * num_parameters(recipe.model)
    return max(1, planned - existing) * one * 11 // 10


def disk_facts(recipe: Recipe, directory: Path, free_bytes: int | None) -> dict[str, int]:
    """Bytes that are free in a directory and bytes that the recipe's checkpoints need.

    Args:
        recipe: the run.
        directory: where it saves.
        free_bytes: taken instead of asking the file system.
    """
    existing = len(find_checkpoints(directory)) if directory.is_dir() else 0
    free = shutil.disk_usage(directory).free if free_bytes is None else free_bytes
    return {"free_bytes": free, "needed_bytes": checkpoint_bytes(recipe, existing)}
