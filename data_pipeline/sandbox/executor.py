"""Judges many programs in pairs of sandboxes; those that stalled once more, one at a time."""

import math
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipeline.sandbox.packages import NO_PACKAGES, Packages
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair, Verdict

Key = TypeVar("Key")


def usable_processors() -> int:
    """Processors that this process may use: by affinity, and by its control group's quota."""
    count = len(os.sched_getaffinity(0))
    for quota, period in _quotas():
        if quota > 0 and period > 0:
            count = min(count, math.ceil(quota / period))
    return max(1, count)


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """Microseconds of processor time and the period, of the group that we are in and those above.

    Both versions of control groups; inside of a container its own group is the root.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                if controllers:
                    texts = [(folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period")]
                else:
                    texts = (folder / "cpu.max").read_text().split()
                yield int(texts[0]), int(texts[1])
            except (OSError, ValueError):  # no such file, or "max"
                continue


def judge_all(
    programs: Iterable[tuple[Key, str, ProgramTest]],
    *,
    workers: int,
    limits: Limits,
    isolate: bool,
    packages: Packages = NO_PACKAGES,
) -> Iterator[tuple[Key, Verdict]]:
    """Judge programs; the verdicts come in the order in which they are reached.

    A program that waited until it was stopped is judged again when all others are done, alone, so
    that the verdict does not depend on how many workers there are.

    Closing the iterator early stops the workers after their present program.

    Args:
        programs: key, source text and test of each.
        workers: threads, each with a pair of sandboxes.
        limits: for each program.
        isolate: False runs without a sandbox.
        packages: what programs and tests may import.

    Raises:
        ValueError: a sandbox cannot be had.
    """
    jobs = list(programs)
    stalled: list[tuple[Key, str, ProgramTest]] = []
    by_number = _judge_each(enumerate(jobs), workers, limits, isolate, packages)
    for number, verdict in by_number:
        if verdict.status == "stalled":
            stalled.append(jobs[number])
        else:
            yield jobs[number][0], verdict
    for number, verdict in _judge_each(enumerate(stalled), 1, limits, isolate, packages):
        yield stalled[number][0], verdict


def _judge_each(
    programs: Iterable[tuple[int, tuple[object, str, ProgramTest]]],
    workers: int,
    limits: Limits,
    isolate: bool,
    packages: Packages,
) -> Iterator[tuple[int, Verdict]]:
    """Judge each program once, by its number; see `judge_all`."""
    waiting: queue.SimpleQueue[tuple[int, tuple[object, str, ProgramTest]]] = queue.SimpleQueue()
    for program in programs:
        waiting.put(program)
    workers = min(workers, waiting.qsize())
    done: queue.SimpleQueue[tuple[int, Verdict] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        # the kernel ends a sandbox with the thread that started it, so the pair is started here
        try:
            pair = SandboxPair(limits, isolate=isolate, packages=packages)
            try:
                while not stopped.is_set():
                    number, (_, text, test) = waiting.get_nowait()
                    done.put((number, pair.judge(text, test)))
            finally:
                pair.close()
        except queue.Empty:
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        running = workers
        while running:
            item = done.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
