"""Crashes, lost power, flipped bits and full disks in saves of a small state, and what must hold.

The tests take a few of each; `tests.faults.soak` takes all, for as long as one likes. Every
function returns an `Outcome`; what must never happen is among its violations.
"""

import hashlib
import itertools
import json
import pickle
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.disk_model import ALL, SURVIVORS, Disk, Image, read_image, write_image
from tests.faults.file_calls import Call
from tests.faults.small_saves import CRASHED, write_tokenizer
from tests.layouts import Launcher

OLD, BEFORE, NEW = 10, 20, 30
"""Steps that are saved before; the save of `NEW` is disturbed, and drops `OLD`."""


@dataclass
class Outcome:
    """How often something was tried, and what went wrong."""

    trials: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def count(self, **figures: float) -> None:
        """Add to the figures."""
        for key, number in figures.items():
            self.figures[key] = self.figures.get(key, 0) + number

    def add(self, other: "Outcome") -> None:
        """Add another outcome to this one."""
        self.trials += other.trials
        self.count(**other.figures)
        self.violations += other.violations


@dataclass(frozen=True)
class Kind:
    """How a save is made."""

    processes: int
    asynchronous: bool

    def __str__(self) -> str:
        plural = "es" if self.processes > 1 else ""
        how = "background" if self.asynchronous else "foreground"
        return f"{self.processes} process{plural}, {how}"


KINDS = [Kind(1, False), Kind(1, True), Kind(2, False), Kind(2, True)]


class Saves:
    """Disturbs saves, each in a process of its own, in directories below `folder`."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher = launcher
        self.folder = folder
        self._numbers = itertools.count()
        self._bases: dict[int, Path] = {}

    def new_path(self, name: str) -> Path:
        """A path that nobody has used."""
        return self.folder / f"{name}-{next(self._numbers)}"

    def call(self, entry: str, processes: int = 1, **job: Any) -> tuple[list[int], str]:
        """Let a function of `tests.faults.small_saves` do a job; exit statuses and output."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        values = {k: str(v) if isinstance(v, Path) else v for k, v in job.items()}
        statuses = self.launcher.train(
            [json.dumps(values)], processes, log, f"tests.faults.small_saves:{entry}"
        )
        return statuses, log.read_text() if log.exists() else ""

    def ask(self, entry: str, **job: Any) -> Any:
        """Let one process do a job, and return its answer."""
        answer = self.new_path("answer")
        statuses, printed = self.call(entry, answer=answer, **job)
        assert statuses == [0], printed
        return json.loads(answer.read_text())

    def base(self, processes: int) -> Path:
        """A run directory with checkpoints of `OLD` and `BEFORE`, for copying."""
        if processes not in self._bases:
            path = self.new_path("base")
            write_tokenizer(path)
            statuses, printed = self.call(
                "save_steps", processes, run_dir=path, asynchronous=False, steps=[OLD, BEFORE]
            )
            assert set(statuses) == {0}, printed
            self._bases[processes] = path
        return self._bases[processes]

    def record(self, kind: Kind, new: bool) -> tuple[Path, list[list[Call]], Path]:
        """Save once undisturbed; where, each process's calls, and what there was before.

        With `new` there is no run directory yet, and its parent is watched.
        """
        root, before = self.new_path("recorded"), self.new_path("before")
        answer = self.new_path("calls")
        for path in (root, before):
            path.mkdir() if new else shutil.copytree(self.base(kind.processes), path)
        statuses, printed = self.call(
            "save_watched", kind.processes, answer=answer, **_job(kind, root, new)
        )
        assert set(statuses) == {0}, printed
        paths = [Path(f"{answer}.{rank}") for rank in range(kind.processes)]
        return root, [pickle.loads(path.read_bytes()) for path in paths], before

    def check(self, images: list[tuple[str, Image]], new: bool, outcome: Outcome) -> list[Any]:
        """Let a run find and continue what directories hold; each distinct one once."""
        directories: dict[bytes, Path] = {}
        keys = []
        for _, image in images:
            key = hashlib.sha256(pickle.dumps(sorted(image.items()))).digest()
            if key not in directories:
                directories[key] = self.new_path("image")
                write_image(image, directories[key])
            keys.append(key)
        run_dirs = [str(path / "a/b/run" if new else path) for path in directories.values()]
        answers = dict(zip(directories, self.ask("check", directories=run_dirs), strict=True))
        allowed = {None, NEW} if new else {BEFORE, NEW}
        for (label, _), key in zip(images, keys, strict=True):
            answer = answers[key]
            if answer["problem"] or answer["step"] not in allowed:
                outcome.violations.append(f"{label}: {answer}")
        for path in directories.values():
            shutil.rmtree(path)
        outcome.trials += len(images)
        outcome.count(directories=len(directories))
        return [answers[key]["step"] for key in keys]


def _job(kind: Kind, root: Path, new: bool) -> dict[str, Any]:
    run_dir = root / "a/b/run" if new else root
    return {
        "run_dir": run_dir, "root": root, "asynchronous": kind.asynchronous,
        "step": NEW, "new": new,
    }  # fmt: skip


def choose_points(
    calls: list[list[Call]], limit: int | None, generator: random.Random
) -> list[tuple[int, int]]:
    """Crash points as (rank, number): all, or each rank's first and last of each kind and more."""
    points = [(rank, number) for rank, own in enumerate(calls) for number in range(len(own))]
    if limit is None:
        return points
    chosen = set()
    for rank, own in enumerate(calls):
        for kind in {call.kind for call in own}:
            numbers = [number for number, call in enumerate(own) if call.kind == kind]
            chosen |= {(rank, numbers[0]), (rank, numbers[-1])}
    rest = [point for point in points if point not in chosen]
    return sorted(chosen | set(generator.sample(rest, min(len(rest), max(0, limit - len(chosen))))))


def crash_points(saves: Saves, kind: Kind, limit: int | None, rng: random.Random) -> Outcome:
    """A process dies at a call that changes a file; a write is half done then."""
    outcome = Outcome()
    _, calls, _ = saves.record(kind, new=False)
    images = []
    points = choose_points(calls, limit, rng)
    for rank, number in points:
        root = saves.new_path("crashed")
        shutil.copytree(saves.base(kind.processes), root)
        statuses, printed = saves.call(
            "save_watched", kind.processes, crash=[rank, number], **_job(kind, root, new=False)
        )
        label = f"{kind}: process {rank} dies at call {number}"
        if statuses[rank] != CRASHED or -9 in statuses:
            outcome.violations.append(f"{label}: exit statuses {statuses}: {printed}")
        images.append((label, read_image(root)))
        shutil.rmtree(root)
    steps = saves.check(images, new=False, outcome=outcome)
    outcome.count(of=sum(len(own) for own in calls), resumed_from_new=steps.count(NEW))
    return outcome


def power_loss(saves: Saves, kind: Kind, rng: random.Random, new: bool, rounds: int = 1) -> Outcome:
    """The power fails after each call, and takes what was not synced, in several ways."""
    outcome = Outcome()
    root, per_process, before = saves.record(kind, new)
    calls = sorted(itertools.chain(*per_process), key=lambda call: call.nanoseconds)
    hosts = [True] if kind.processes == 1 else [True, False]
    images: list[tuple[str, Image]] = []
    last: list[int] = []
    for shared_cache in hosts:
        disk = Disk(before, shared_cache)
        for number in range(len(calls) + 1):
            start = len(images)
            for survivors in SURVIVORS:
                repeat = 3 * rounds if "random" in survivors else 1
                at = f"{kind}: power lost before call {number}, names {survivors[0]}, "
                label = f"{at}bytes {survivors[1]}, {'one host' if shared_cache else 'a host each'}"
                images += [(label, disk.image(survivors, rng)) for _ in range(repeat)]
            if number < len(calls):
                disk.apply(calls[number])
            else:
                last += range(start, len(images))
        if disk.image(ALL, rng) != read_image(root):
            outcome.violations.append(f"{kind}: a change of the directory was not recorded")
    steps = saves.check(images, new, outcome)
    if any(steps[number] != NEW for number in last):
        outcome.violations.append(f"{kind}: the save had returned and its checkpoint is lost")
    outcome.count(resumed_from_new=steps.count(NEW))
    return outcome


def bit_flips(saves: Saves, trials: int, rng: random.Random) -> Outcome:
    """One bit of a checkpoint changes: found, named, set aside, the one before used."""
    run_dir = saves.new_path("flipped")
    shutil.copytree(saves.base(2), run_dir)
    seed = rng.randrange(2**32)
    answer = saves.ask("find_with_flipped_bits", run_dir=run_dir, trials=trials, seed=seed)
    detected = trials - len(answer["missed"])
    assert all(answer["hits"].values()), answer["hits"]
    return Outcome(trials, {"detected": detected}, list(answer["missed"]))


def failing_disk(saves: Saves, asynchronous: bool, errors: Sequence[str]) -> Outcome:
    """From any call of a save on, the disk refuses with each of these errors; then it is well."""
    outcome = Outcome()
    for name in errors:
        run_dir = saves.new_path("refused")
        write_tokenizer(run_dir)
        answer = saves.ask(
            "save_on_failing_disk", run_dir=run_dir, asynchronous=asynchronous, errno=name
        )
        violations = [f"{name}: {text}" for text in answer["violations"]]
        outcome.add(Outcome(answer["trials"], {name: answer["trials"]}, violations))
    return outcome


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[bool]:
    """A tmpfs of so many bytes at `path`, and whether one could be mounted."""
    path.mkdir()
    options = f"size={size},nr_inodes=200"
    command = ["mount", "-t", "tmpfs", "-o", options, "megaphi-test", str(path)]
    mounted = (
        shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def full_disk(saves: Saves, asynchronous: bool, inodes: bool) -> Outcome | None:
    """A real file system runs out of pages, or of files, at every stage; None without one."""
    path = saves.new_path("disk")
    with small_disk(path, size=1 << 20) as mounted:
        if not mounted:
            return None
        run_dir = path / "run"
        write_tokenizer(run_dir)
        answer = saves.ask(
            "save_on_small_disk", run_dir=run_dir, asynchronous=asynchronous, inodes=inodes
        )
    assert answer["enough"], "the last save had enough space"
    return Outcome(answer["trials"], {"stages": answer["trials"]}, answer["violations"])


def long_files(saves: Saves, asynchronous: bool) -> Outcome:
    """The process may write no file longer than this (RLIMIT_FSIZE): every stage of a save."""
    run_dir = saves.new_path("limited")
    write_tokenizer(run_dir)
    limits = [1, 100, 1000, 2000, 4000, 4900, 5100, 8000, 12000, 1 << 20]
    answer = saves.ask(
        "save_on_small_disk", run_dir=run_dir, asynchronous=asynchronous, limits=limits
    )
    return Outcome(answer["trials"], {"stages": answer["trials"]}, answer["violations"])


def save_memory(saves: Saves, asynchronous: bool, count: int) -> Outcome:
    """Memory over many saves: no growth, and a peak near what the state and its snapshot need."""
    run_dir = saves.new_path("memory")
    answer = saves.ask("measure_memory", run_dir=run_dir, asynchronous=asynchronous, saves=count)
    late = answer["resident"][count // 2 :]
    centre = (len(late) - 1) / 2
    slope = sum((i - centre) * value for i, value in enumerate(late)) / sum(
        (i - centre) ** 2 for i in range(len(late))
    )
    peak, growth = answer["peak"] / answer["state"], slope / answer["state"]
    outcome = Outcome(count, {"peak": round(peak, 3), "growth": round(growth, 6)})
    if peak > 2.2:
        outcome.violations.append(f"the peak is {peak:.2f} times the state")
    if growth > 0.001:
        outcome.violations.append(f"a save adds {growth:.4f} of the state")
    return outcome
