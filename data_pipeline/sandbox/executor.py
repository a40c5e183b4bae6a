"""Judges many programs on several lanes at once."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Lane, Limits, Verdict

Key = TypeVar("Key")


def judge_all(
    programs: Iterable[tuple[Key, str, ProgramTest]], *, workers: int, limits: Limits, isolate: bool
) -> Iterator[tuple[Key, Verdict]]:
    """Judge programs, each once; the verdicts come in the order in which they are reached.

    Closing the iterator early stops the lanes after their present program.

    Args:
        programs: key, source text and test of each.
        workers: lanes, each a thread with two sandboxes.
        limits: for each program.
        isolate: False runs without a sandbox.

    Raises:
        ValueError: a sandbox cannot be had.
    """
    waiting: queue.SimpleQueue[tuple[Key, str, ProgramTest]] = queue.SimpleQueue()
    for program in programs:
        waiting.put(program)
    workers = min(workers, waiting.qsize())
    done: queue.SimpleQueue[tuple[Key, Verdict] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        # the kernel ends a sandbox with the thread that started it, so the lane begins here
        try:
            lane = Lane(limits, isolate=isolate)
            try:
                while not stopped.is_set():
                    key, text, test = waiting.get_nowait()
                    done.put((key, lane.judge(text, test)))
            finally:
                lane.close()
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
