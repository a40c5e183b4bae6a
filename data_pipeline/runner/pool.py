"""A pool of worker processes that keeps the order of the tasks and leaves nothing behind.

Spawned rather than forked processes, so that threads of native libraries cannot deadlock a child;
a worker that dies is an error and not a hang; a parent that is killed takes its workers along.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megaphi.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it: a killed parent must not leave workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Tokenizer threads inside each of N processes would fight over the same N cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(task)` of each task, in the order of the tasks, from `workers` processes.

    With one worker or one task everything runs in this process. At most two tasks a worker are
    under way, so that results do not pile up.

    Args:
        function: a module-level function; it and the tasks are sent to spawned processes.
        tasks: the work.
        workers: number of processes.

    Raises:
        RunError: a worker died (killed, out of memory, a crash in native code).
        Exception: what `function` raised.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[Result]] = deque()
    done = 0
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
                    done += 1
            while pending:
                yield pending.popleft().result()
                done += 1
        except BrokenProcessPool:
            raise RunError(
                f"a worker process died at shard {done} or one of the next {2 * workers - 1} "
                "(killed, out of memory or a native crash); run again to go on from there, "
                "with `workers` 1 to see which"
            ) from None
        finally:
            for future in pending:
                future.cancel()
