"""A run that hangs says where, and ends, so that it can be started again.

Collectives hang when one process stops: the others wait for it without a word. So every process
writes its step and phase into a small file of its own, `<run_dir>/heartbeats/rank-00003`, each time
they change (one write into the page cache, a few microseconds), and a thread of every process
notices when they have not changed for `train.hang_seconds`. A file keeps its last content when its
process is stopped, killed or unreachable, which is what the others then read.

A process that hangs marks its heartbeat so, appends the stacks of its threads to
`<run_dir>/hangs/rank-00003.txt`, gives the others a moment to do the same, and exits with
`EXIT_HUNG`. Guilty are the processes that have not marked theirs: they are stopped, or their host
is gone. If all have, those furthest behind are: they stand before the collective that the others
are in. On a GPU the host runs ahead of the device, and a hang shows where it waits: in `report`.

A last resort is independent of Python: `faulthandler`'s own thread ends a process whose interpreter
is stuck, or whose file system no longer answers, some time after the watchdog should have.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaphi.errors import EXIT_HUNG

PHASES = (
    "start",
    "data",
    "forward_backward",
    "optimizer",
    "report",
    "replicas",
    "evaluate",
    "save",
    "rewind",
)
"""In the order of a step. `report`: the host waits for the numbers of an earlier step."""

SLOW_START = 3
"""Loading reads the whole state and the first step compiles: they may take so many times longer."""

_RECORD_BYTES = 160
LAST_RESORT_SECONDS = 30.0  # beyond what the watchdog needs, until Python is no longer trusted


@dataclass(frozen=True)
class Heartbeat:
    """Where a process was last."""

    rank: int
    host: str
    process: int
    step: int
    phase: str
    hung: bool
    """Whether it noticed by itself that nothing moves."""

    def encode(self) -> bytes:
        """The content of a heartbeat file; always as long, so that one write replaces it all."""
        words = (self.rank, self.host[:80], self.process, self.step, self.phase, int(self.hung))
        return " ".join(map(str, words)).encode().ljust(_RECORD_BYTES)

    @classmethod
    def decode(cls, content: bytes) -> "Heartbeat":
        """From the content of a heartbeat file."""
        rank, host, process, step, phase, hung = content.decode().split()
        return cls(int(rank), host, int(process), int(step), phase, hung == "1")


def suspects(heartbeats: list[Heartbeat]) -> tuple[list[Heartbeat], str]:
    """The processes that the others wait for, and how that is known.

    Args:
        heartbeats: those of all processes that have one, read after they had time to notice.
    """
    silent = [beat for beat in heartbeats if not beat.hung]
    if silent:
        return silent, "does not answer: it is stopped, or its host is gone"
    places = [(beat.step, PHASES.index(beat.phase)) for beat in heartbeats]
    behind = [beat for beat, place in zip(heartbeats, places, strict=True) if place == min(places)]
    if len(behind) == len(heartbeats) > 1:
        return behind, "all processes are at the same place: the network, a device or the storage"
    return behind, "is behind the others"


def speaker(heartbeats: list[Heartbeat]) -> int | None:
    """The rank that reports the hang for all: the lowest of those that noticed it, if any did."""
    return min((beat.rank for beat in heartbeats if beat.hung), default=None)


def describe_hang(heartbeats: list[Heartbeat], num_ranks: int, seconds: float) -> str:
    """One line that names the guilty processes, at most four of them in words."""
    guilty, reason = suspects(heartbeats)
    named = "; ".join(
        f"rank {beat.rank} (host {beat.host}, process {beat.process}) at step {beat.step} in "
        f"{beat.phase}"
        for beat in guilty[:4]
    )
    more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
    missing = sorted(set(range(num_ranks)) - {beat.rank for beat in heartbeats})
    unseen = f"; no heartbeat of ranks {missing[:8]}" if missing else ""
    return f"hang: nothing moved for {seconds:.0f} s; {named}{more}: {reason}{unseen}"


class Watchdog:
    """Watches one process of a run from a thread of it; `close` when it is done.

    Args:
        run_dir: directory that all processes share; heartbeats and stacks go there.
        rank: number of this process.
        num_ranks: number of all processes.
        seconds: without progress until the process is ended; 0 turns the watchdog off.
    """

    def __init__(self, run_dir: Path, rank: int, num_ranks: int, seconds: float) -> None:
        self._directory = run_dir
        self._rank = rank
        self._num_ranks = num_ranks
        self._seconds = seconds
        self._host = "_".join(socket.gethostname().split()) or "unknown"
        self._place = (0, "start")
        self._first_step: int | None = None
        self._file = -1
        self._closed = threading.Event()
        if seconds <= 0:
            return
        # others read what is there: a heartbeat of an earlier run must not stay
        for name in ("heartbeats", "hangs"):
            (run_dir / name).mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._file = os.open(self._path(rank), flags, 0o644)
        self.enter("start", 0)
        self._thread = threading.Thread(target=self._watch, name="megaphi-watchdog", daemon=True)
        self._thread.start()

    def _path(self, rank: int) -> Path:
        """The heartbeat file of a process."""
        return self._directory / "heartbeats" / f"rank-{rank:05d}"

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what this process begins to do; that is progress, also within the same phase.

        Args:
            phase: one of `PHASES`.
            step: the step it belongs to; the same as before when not given.
        """
        # a new object every time: the thread sees by its identity that something moved
        self._place = (self._place[0] if step is None else step, phase)
        if phase in ("start", "rewind"):
            self._first_step = None
        elif self._first_step is None:
            self._first_step = self._place[0]
        if self._file >= 0:
            self._publish(hung=False)

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Do something within another phase, which continues afterwards."""
        before = self._place[1]
        self.enter(phase)
        yield
        self.enter(before)

    def _publish(self, *, hung: bool) -> None:
        """Write this process's heartbeat."""
        step, phase = self._place
        beat = Heartbeat(self._rank, self._host, os.getpid(), step, phase, hung)
        with contextlib.suppress(OSError):  # a full disk must not end the run because of this
            os.pwrite(self._file, beat.encode(), 0)

    def limit(self) -> float:
        """Seconds without progress that are too many where the process is now."""
        is_slow = self._first_step is None or self._first_step == self._place[0]
        return self._seconds * (SLOW_START if is_slow else 1)

    def _watch(self) -> None:
        """The thread: count the time in which nothing moves."""
        tick = min(1.0, self._seconds / 20)
        seen, still, last = self._place, 0.0, time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            # a machine that was suspended as a whole does not hang: its clock jumps
            still += min(now - last, 5 * tick)
            last = now
            if self._place is not seen:
                seen, still = self._place, 0.0
            limit = self.limit()
            last_resort = limit + self._patience() + LAST_RESORT_SECONDS
            faulthandler.dump_traceback_later(last_resort, exit=True, file=2)
            if still >= limit:
                self._leave(still)
        faulthandler.cancel_dump_traceback_later()

    def _patience(self) -> float:
        """Seconds for the other processes to notice as well: they stood still a little later."""
        return min(10.0, self._seconds / 10)

    def _leave(self, seconds: float) -> None:
        """Write down where every thread is, name the guilty process, and end this one."""
        self._publish(hung=True)
        with contextlib.suppress(OSError):
            os.fsync(self._file)  # other hosts must see it
        step, phase = self._place
        stacks = self._directory / "hangs" / f"rank-{self._rank:05d}.txt"
        with contextlib.suppress(OSError), stacks.open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{now} rank {self._rank} at step {step} in {phase}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(self._patience())
        beats = self._read_all()
        if speaker(beats) in (self._rank, None):
            text = describe_hang(beats, self._num_ranks, seconds)
            with contextlib.suppress(OSError):
                message = f"megaphi: {text}; stacks in {stacks.parent}; run me again\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        os._exit(EXIT_HUNG)  # the other threads cannot be reached

    def _read_all(self) -> list[Heartbeat]:
        """The heartbeats of all processes that can be read."""
        found = []
        for rank in range(self._num_ranks):
            with contextlib.suppress(OSError, ValueError):
                found.append(Heartbeat.decode(self._path(rank).read_bytes()))
        return found

    def close(self) -> None:
        """Stop watching."""
        if self._file >= 0:
            self._closed.set()
            self._thread.join()
            os.close(self._file)
            self._file = -1
