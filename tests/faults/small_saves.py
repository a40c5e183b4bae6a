"""Saves of a small state, disturbed; and what can be read afterwards. For tests.layouts to start.

Each function here is an entry of its launcher: it gets one JSON object and writes its answer, where
it has one, to the file that `answer` names.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from megaphi.checkpoint import shards
from megaphi.checkpoint.manager import CheckpointManager
from megaphi.config import Checkpoint, Data, Recipe, Train
from megaphi.formats.manifest import CheckpointError, find_checkpoints, verify_checkpoint
from megaphi.parallel.mesh import Mesh, processes
from tests.faults.file_calls import Call, watch_files

CRASHED = 137
ROWS, COLUMNS, TENSORS = 64, 16, 5


def value(name: str, step: int, rows: int = ROWS) -> Tensor:
    """What a tensor holds at a step: every element differs from those of other steps."""
    order = torch.arange(rows * COLUMNS, dtype=torch.float64).reshape(rows, COLUMNS)
    return (torch.sin(order + sum(name.encode())) + 10.0 * step).float()


def names() -> list[str]:
    """The tensors of the state; the last one is whole on every process."""
    return [f"model.layer_{number}.weight" for number in range(TENSORS)] + ["model.norm"]


def state(step: int, mesh: Mesh, rows: int = ROWS) -> dict[str, Tensor]:
    """The state of a step, as this process has it."""
    *sharded, whole = names()
    tensors = {
        name: distribute_tensor(value(name, step, rows), mesh.shards, [Shard(0)])
        for name in sharded
    }
    return {**tensors, whole: value(whole, step, rows)}


def trainer_state(step: int) -> dict[str, Any]:
    """What is saved beside the tensors, some kilobytes."""
    return {"step": step, "text": "abcdefgh" * 600}


@contextlib.contextmanager
def manager_of(run_dir: Path, asynchronous: bool) -> Iterator[CheckpointManager]:
    """The checkpoints of a run that does not train; several tensor files a process."""
    shards.MAX_FILE_BYTES = ROWS * COLUMNS * 4 * 2
    recipe = Recipe(
        train=Train(run_dir=str(run_dir), steps=1),
        data=Data(train="no-tokens"),
        checkpoint=Checkpoint(asynchronous=asynchronous),
    )
    with processes(recipe.parallel) as mesh:
        manager = CheckpointManager(recipe, mesh)
        try:
            yield manager
        finally:
            manager.close()


def write_tokenizer(run_dir: Path) -> None:
    """Put something into the run's tokenizer directory, which every checkpoint copies."""
    (run_dir / "tokenizer").mkdir(parents=True)
    (run_dir / "tokenizer" / "tokenizer.json").write_text('{"padding": "' + "x" * 5000 + '"}')


def _job(argv: list[str]) -> tuple[dict[str, Any], Path]:
    job: dict[str, Any] = json.loads(argv[0])
    return job, Path(job["run_dir"])


def save_steps(argv: list[str]) -> int:
    """Save each of `steps`, undisturbed."""
    job, run_dir = _job(argv)
    with manager_of(run_dir, job["asynchronous"]) as manager:
        manager.prepare(state(0, manager.mesh))
        for step in job["steps"]:
            manager.save(step, state(step, manager.mesh), trainer_state(step))
        manager.wait()
    return 0


def save_watched(argv: list[str]) -> int:
    """Save `step` and record what happens to the files below `root`, or crash at one call.

    With `crash` as [rank, number] the process of that rank ends at that call, half done if it is a
    write. Else each rank pickles its calls to `<answer>.<rank>`.
    """
    job, run_dir = _job(argv)
    rank = int(os.environ["RANK"])
    crash_rank, crash_number = job.get("crash") or (-1, -1)

    def disturb(number: int, _: Call, half: Any) -> None:
        if rank == crash_rank and number == crash_number:
            half()
            os._exit(CRASHED)

    with contextlib.ExitStack() as stack:
        if job.get("new"):  # the run directory's own creation counts too
            calls = stack.enter_context(watch_files(Path(job["root"]), rank, disturb))
        manager = stack.enter_context(manager_of(run_dir, job["asynchronous"]))
        tensors = state(job["step"], manager.mesh)
        manager.prepare(tensors)
        if not job.get("new"):
            calls = stack.enter_context(watch_files(Path(job["root"]), rank, disturb))
        manager.save(job["step"], tensors, trainer_state(job["step"]))
        if job["asynchronous"]:
            for tensor in tensors.values():
                tensor.zero_()  # training goes on
        manager.wait()
    if job.get("answer"):
        Path(f"{job['answer']}.{rank}").write_bytes(pickle.dumps(calls))
    return 0


def _check(run_dir: Path) -> dict[str, Any]:
    """What a run finds in a directory, whether it is what was saved, and whether it can go on."""
    answer: dict[str, Any] = {"step": None, "problem": None}
    for path in find_checkpoints(run_dir):
        verify_checkpoint(path)  # what has the name is whole
    pointer = run_dir / "latest"
    if pointer.exists():
        verify_checkpoint(run_dir / pointer.read_text().strip())
    with manager_of(run_dir, asynchronous=False) as manager:
        found = manager.find()
        step = 0
        if found is not None:
            tensors = {name: torch.full_like(value(name, 0), float("nan")) for name in names()}
            loaded = manager.load(found, lambda _: tensors)
            answer["step"] = step = int(found.name.removeprefix("step-"))
            if loaded != trainer_state(step):
                answer["problem"] = f"step {step} has another trainer state"
            for name, tensor in tensors.items():
                if not torch.equal(tensor, value(name, step)):
                    answer["problem"] = f"{name} is not that of step {step}"
        after = step + 1000
        manager.save(after, state(after, manager.mesh), trainer_state(after))
    verify_checkpoint(run_dir / f"step-{after:08d}")
    strays = [p.name for p in run_dir.iterdir() if p.name.startswith(".step") or "." in p.name[1:]]
    if strays:
        answer["problem"] = f"left behind: {strays}"
    return answer


def check(argv: list[str]) -> int:
    """Check each of `directories`; the answer is a list."""
    job: dict[str, Any] = json.loads(argv[0])
    answers = []
    for directory in job["directories"]:
        try:
            answers.append(_check(Path(directory)))
        except Exception as error:
            answers.append({"step": None, "problem": f"{type(error).__name__}: {error}"})
    Path(job["answer"]).write_text(json.dumps(answers))
    return 0


_NEEDS_SPACE = ("create", "mkdir", "write", "truncate")


def save_on_failing_disk(argv: list[str]) -> int:
    """Save again and again; from its k-th call on the disk refuses, for every k.

    `errno` names the error: ENOSPC and EDQUOT hit what needs space, EROFS hits every change, EIO
    hits syncs. After each the disk is well again and the next save must succeed.
    """
    job, run_dir = _job(argv)
    code = getattr(errno, job["errno"])
    hit = {"EROFS": None, "EIO": ("sync",)}.get(job["errno"], _NEEDS_SPACE)
    violations, trials, step = [], 0, 1

    def refuse(number: int, call: Call, half: Any) -> None:
        if number >= first and (hit is None or call.kind in hit):
            raise OSError(code, os.strerror(code))

    with manager_of(run_dir, job["asynchronous"]) as manager:
        manager.prepare(state(0, manager.mesh))
        for step in (1, 2):
            manager.save(step, state(step, manager.mesh), trainer_state(step))
            manager.wait()
        for first in range(100_000):
            before = find_checkpoints(run_dir)
            step += 1
            with watch_files(run_dir, 0, refuse) as calls:
                error = _error_of(manager, step)
            if len(calls) == 0 and first > 0 and error is None:
                raise AssertionError("no call was seen")
            trials += 1
            violations += _violations(run_dir, before, step, error, code, gone=hit is not None)
            if error is None and first > len(calls):
                break
            step += 1
            manager.save(step, state(step, manager.mesh), trainer_state(step))
            manager.wait()
            verify_checkpoint(run_dir / f"step-{step:08d}")
    Path(job["answer"]).write_text(json.dumps({"trials": trials, "violations": violations}))
    return 0


def _error_of(manager: CheckpointManager, step: int) -> Exception | None:
    """The error of a save, if it has one."""
    try:
        manager.save(step, state(step, manager.mesh), trainer_state(step))
        manager.wait()
    except (CheckpointError, OSError) as error:
        return error
    return None


def _violations(
    run_dir: Path, before: list[Path], step: int, error: Exception | None, code: int, gone: bool
) -> list[str]:
    """What a failed save must not have done."""
    found = []
    new = run_dir / f"step-{step:08d}"
    sound = [path for path in [*before, new] if path.exists()]
    for path in sound:
        verify_checkpoint(path)
    if error is None:
        if not new.exists():
            found.append(f"step {step}: no error and no checkpoint")
        return found
    if os.strerror(code) not in str(error) or str(run_dir) not in str(error):
        found.append(f"step {step}: unclear: {error}")
    if not new.exists() and sound != before:
        found.append(f"step {step}: an older checkpoint went")
    if gone and (strays := [path.name for path in run_dir.glob(".step-*")]):
        found.append(f"step {step}: left behind {strays}")
    return found


def save_on_small_disk(argv: list[str]) -> int:
    """Save with every amount of free space from nothing to enough, on the file system of run_dir.

    With `inodes` it is files that run out, not bytes. With `limit` the process may not write files
    longer than that (RLIMIT_FSIZE); the limits are tried one by one.
    """
    job, run_dir = _job(argv)
    violations, trials, step = [], 0, 0
    code = errno.EFBIG if "limits" in job else errno.ENOSPC
    with manager_of(run_dir, job["asynchronous"]) as manager:
        manager.prepare(state(0, manager.mesh))
        for step in (1, 2):
            manager.save(step, state(step, manager.mesh), trainer_state(step))
            manager.wait()
        for amount in job.get("limits") or range(1000):
            before = find_checkpoints(run_dir)
            step += 1
            with _short_of(job, run_dir.parent, amount):
                error = _error_of(manager, step)
            trials += 1
            violations += _violations(run_dir, before, step, error, code, gone=True)
            if error is None and amount > 0:
                break
            step += 1
            manager.save(step, state(step, manager.mesh), trainer_state(step))
            manager.wait()
            verify_checkpoint(run_dir / f"step-{step:08d}")
    Path(job["answer"]).write_text(
        json.dumps({"trials": trials, "violations": violations, "enough": error is None})
    )
    return 0


@contextlib.contextmanager
def _short_of(job: dict[str, Any], disk: Path, amount: int) -> Iterator[None]:
    """Leave `amount` pages or files free on a small disk, or limit the length of files."""
    if "limits" in job:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (amount, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    filler = disk / "filler"
    filler.mkdir()
    free = os.statvfs(disk)
    if job["inodes"]:
        for number in range(max(0, free.f_ffree - amount)):
            (filler / str(number)).touch()
    else:
        with (filler / "pages").open("wb", buffering=0) as file:
            file.write(bytes(max(0, free.f_bavail - amount) * free.f_bsize))
    try:
        yield
    finally:
        for path in filler.iterdir():
            path.unlink()
        filler.rmdir()


def find_with_flipped_bits(argv: list[str]) -> int:
    """Flip one bit of the newest checkpoint at a time and look for one to resume from.

    Every file is hit, `trials` times in all; the answer counts what was found and says what not.
    """
    job, run_dir = _job(argv)
    generator = random.Random(job["seed"])
    newest, older = find_checkpoints(run_dir)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    missed, hits = [], dict.fromkeys((str(p.relative_to(newest)) for p in files), 0)
    with manager_of(run_dir, asynchronous=False) as manager:
        for trial in range(job["trials"]):
            path = files[trial % len(files)] if trial < 2 * len(files) else generator.choice(files)
            hits[str(path.relative_to(newest))] += 1
            sound = path.read_bytes()
            place, bit = generator.randrange(len(sound)), generator.randrange(8)
            path.write_bytes(_flipped(sound, place, bit))
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                found = manager.find()
            aside = newest.with_name(f"{newest.name}.corrupt-1")
            if found != older or not aside.is_dir() or str(path) not in said.getvalue():
                missed.append(f"{path} byte {place} bit {bit}: {found}, {said.getvalue()}")
            if aside.is_dir():
                aside.rename(newest)
            path.write_bytes(sound)
        assert manager.find() == newest
    answer = {"trials": job["trials"], "hits": hits, "missed": missed}
    Path(job["answer"]).write_text(json.dumps(answer))
    return 0


def _flipped(content: bytes, place: int, bit: int) -> bytes:
    """A copy with one other bit."""
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def measure_memory(argv: list[str]) -> int:
    """Save `saves` times; resident memory after each, and the peak, in bytes beside the state's."""
    job, run_dir = _job(argv)
    with manager_of(run_dir, job["asynchronous"]) as manager:
        manager.save(1, state(1, manager.mesh), trainer_state(1))  # whatever is loaded only once
        before = _memory("VmRSS")
        tensors = {f"model.{number}": torch.ones(1 << 18) for number in range(48)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        shards.MAX_FILE_BYTES = size // 48
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        manager.prepare(tensors)
        resident = []
        for step in range(2, job["saves"] + 2):
            manager.save(step, tensors, trainer_state(1))
            manager.wait()
            resident.append(_memory("VmRSS"))
        peak = _memory("VmHWM") - before
    Path(job["answer"]).write_text(json.dumps({"state": size, "resident": resident, "peak": peak}))
    return 0


def _memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))
