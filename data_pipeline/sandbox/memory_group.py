"""A limit on the memory of all processes of a sandbox together, where the machine lets us set one.

Resource limits count for each process alone; a control group counts them as one. Version 1 groups
can be made by root, version 2 groups where memory control has been delegated to the group that we
are in. Elsewhere what the processes hold together is measured while a program runs, besides the
limits of each.
"""

import contextlib
import itertools
import os
import resource
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_END_SECONDS = 10.0
_numbers = itertools.count()


def _parent() -> tuple[Path, str] | None:
    """The group that we are in and the name of the limit's file; None without memory control."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / place.lstrip("/"), "memory.limit_in_bytes"
        if controllers == "" and (_ROOT / "cgroup.controllers").exists():
            return _ROOT / place.lstrip("/"), "memory.max"
    return None


def _remove_abandoned(folder: Path) -> None:
    """Remove groups of processes that were killed; one that is in use cannot be removed."""
    for path in folder.glob("megaphi-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


class MemoryGroup:
    """A control group for some processes and what they fork; `close` when they have ended.

    Attributes:
        path: the group; None where none can be made.

    Args:
        limit_bytes: of memory, of all the processes together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.path: Path | None = None
        parent = _parent() if Path("/proc/self/cgroup").exists() else None
        if parent is None:
            return
        folder, limit_name = parent
        _remove_abandoned(folder)
        path = folder / f"megaphi-{os.getpid()}-{next(_numbers)}"
        try:
            path.mkdir()
        except OSError:
            return
        try:
            (path / limit_name).write_text(str(limit_bytes))
        except OSError:  # memory control has not been delegated
            path.rmdir()
            return
        self.path = path

    def add(self, pids: set[int]) -> None:
        """Move processes into the group."""
        if self.path is not None:
            for pid in pids:
                (self.path / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group, once the processes in it have ended, which have been killed."""
        deadline = time.monotonic() + _END_SECONDS
        while self.path is not None:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                self.path = None


def descendants(pid: int) -> set[int]:
    """A process and all below it, by the parent that each names in /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


def held_memory(pid: int) -> int:
    """Bytes that a process and all below it hold; what they share counts for each."""
    total = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError, IndexError):  # it ended while we looked
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return total * resource.getpagesize()
