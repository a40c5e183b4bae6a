"""Runs a graph of `megaphi` commands: in parallel, resumably, and counting processor time.

A command that has ended well leaves a note with its words, so that a later call skips it. A command
whose words have changed, or that depends on such a one, runs again.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megaphi.durable import write_durably
from megaphi.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command."""

    name: str
    """Unique; also the name of its note and its log."""
    words: tuple[str, ...]
    """What follows `megaphi`."""
    out: Path
    """What it makes. Removed before the command runs again with other words."""
    after: tuple[str, ...] = ()
    """Names of the jobs whose output it reads."""
    weight: float = 1.0
    """Expected processor time compared with the other jobs, for the estimate of what is left."""


@dataclass(frozen=True)
class Slot:
    """A place where one command runs at a time."""

    environment: Mapping[str, str]


def slots(count: int | None) -> list[Slot]:
    """One per GPU, or else one per processor with one thread each."""
    gpus = _num_gpus()
    if gpus:
        count = min(count or gpus, gpus)
        return [Slot({"CUDA_VISIBLE_DEVICES": str(index)}) for index in range(count)]
    count = count or len(os.sched_getaffinity(0))
    return [Slot({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}) for _ in range(count)]


def _num_gpus() -> int:
    """GPUs that the driver lists and the environment allows; asking torch would take seconds."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([name for name in allowed.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


class Jobs:
    """A graph of commands and the directory of their notes and logs.

    Args:
        jobs: in any order.
        directory: for notes (`NAME.json`) and logs (`NAME.log`).
        say: prints a line of progress.

    Raises:
        ValueError: a job names one that does not exist.
    """

    def __init__(self, jobs: Sequence[Job], directory: Path, say: Callable[[str], None]) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._directory = directory
        self._say = say
        self._began = time.monotonic()
        self._keys: dict[str, str] = {}
        self._stop = threading.Event()
        for job in jobs:
            for name in job.after:
                if name not in self._jobs:
                    raise ValueError(f"job {job.name}: after {name}: no such job")

    def run(self, places: Sequence[Slot]) -> None:
        """Run what has not been done, several at a time.

        Raises:
            RunError: a command failed; its log is named. What is done stays done.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        waiting = {name: job for name, job in self._jobs.items() if not self.is_done(name)}
        total = sum(job.weight for job in waiting.values())
        self._say(f"{len(self._jobs)} steps, {len(self._jobs) - len(waiting)} done before")
        free: SimpleQueue[Slot] = SimpleQueue()
        for place in places:
            free.put(place)
        running: dict[Future[float], Job] = {}
        finished = 0.0
        with ThreadPoolExecutor(len(places)) as pool:
            try:
                while waiting or running:
                    open_names = waiting.keys() | {job.name for job in running.values()}
                    ready = [j for j in waiting.values() if not open_names.intersection(j.after)]
                    for job in ready[: len(places) - len(running)]:
                        del waiting[job.name]
                        running[pool.submit(self._execute, job, free)] = job
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = running.pop(future)
                        seconds = future.result()
                        finished += job.weight
                        self._report(job, seconds, finished / total)
            except BaseException:
                self._stop.set()
                raise

    def is_done(self, name: str) -> bool:
        """Whether a command with these words, on inputs of these words, has ended well."""
        note = self._note(name)
        return note is not None and note["key"] == self._key(name) and self._jobs[name].out.exists()

    def cpu_seconds(self, name: str) -> float:
        """Processor time of a command that is done."""
        note = self._note(name)
        assert note is not None, "asked of done jobs only"
        return float(note["cpu_seconds"])

    def command(self, name: str) -> str:
        """A command as one would type it."""
        return "megaphi " + shlex.join(self._jobs[name].words)

    def _key(self, name: str) -> str:
        """Identity of a command and of all that its inputs come from."""
        if name not in self._keys:
            job = self._jobs[name]
            parts = [*job.words, *(self._key(before) for before in job.after)]
            self._keys[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self._keys[name]

    def _note(self, name: str) -> dict[str, Any] | None:
        path = self._directory / f"{name}.json"
        if not path.is_file():
            return None
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return note

    def _execute(self, job: Job, free: "SimpleQueue[Slot]") -> float:
        """Run one command; returns its processor time in seconds."""
        note = self._note(job.name)
        if note is not None and note["key"] != self._key(job.name):
            _remove(job.out)
        place = free.get()
        log = self._directory / f"{job.name}.log"
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "megaphi", *job.words],
                    env={**os.environ, **place.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                seconds = self._wait(process)
        finally:
            free.put(place)
        if process.returncode != 0:
            raise RunError(f"{self.command(job.name)}: {_last_line(log)} (log: {log})")
        record = {"key": self._key(job.name), "cpu_seconds": round(seconds, 2), "words": job.words}
        write_durably(self._directory / f"{job.name}.json", json.dumps(record) + "\n")
        return seconds

    def _wait(self, process: "subprocess.Popen[bytes]") -> float:
        """Wait for a process, and end it when the graph is given up; returns processor seconds."""
        asked = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_utime + usage.ru_stime
            if self._stop.wait(0.05) and not asked:
                process.terminate()
                asked = True

    def _report(self, job: Job, seconds: float, share: float) -> None:
        passed = time.monotonic() - self._began
        left = passed / share - passed
        self._say(
            f"{share:4.0%}  {job.name}: {seconds:.0f} s of processor time | "
            f"eta {int(left) // 60}m{int(left) % 60:02d}s"
        )


def _remove(path: Path) -> None:
    """Remove what a command made before its words changed."""
    for found in (path, *path.parent.glob(f"{path.name}.*")):
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "failed without a message"
