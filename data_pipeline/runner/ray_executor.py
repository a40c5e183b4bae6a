"""Shards as tasks of a Ray cluster.

One task a shard, spread over the nodes. A task whose node or process dies is run again elsewhere by
Ray, up to `MAX_RETRIES` times; the directory of each attempt is its own (`output.py`), so a node
that is only taken for dead does no harm. Errors that a shard raises are not retried: its input is
broken, and would be again.

Every node needs this version of megaphi, and the driver's working directory and the output under
the same path.
"""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import megaphi
from megaphi.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_RETRIES = 5  # of one shard, after its node or process was lost


def _versions() -> list[str]:
    """What must agree on all nodes for the same bytes to come out."""
    return [megaphi.__version__, "{}.{}".format(*sys.version_info[:2])]


def _call(
    function: Callable[[Task], Result], task: Task, directory: str, versions: list[str]
) -> Result:
    """Run a task on a node of the cluster, in the driver's working directory.

    Raises:
        RunError: the node does not have that directory, or another version.
    """
    if _versions() != versions:
        raise RunError(
            f"{socket.gethostname()} has megaphi and Python {', '.join(_versions())}, the driver "
            f"{', '.join(versions)}: install the same on every node"
        )
    if not Path(directory).is_dir():
        raise RunError(
            f"{directory}: is not there on {socket.gethostname()}; start from a directory that all "
            "nodes share"
        )
    os.chdir(directory)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task a processor, as in the pool
    return function(task)


def connect(address: str | None) -> Any:
    """Import Ray and join a cluster, once a process.

    Args:
        address: of the cluster, such as `10.0.0.1:6379`; None for `RAY_ADDRESS`, a cluster that
            runs on this machine, or else a new one on this machine alone.

    Returns:
        The module `ray`.

    Raises:
        ValueError: Ray is not installed.
        RunError: there is no such cluster.
    """
    # Ray reports its use to its makers unless it is told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("`engine` ray needs Ray: pip install 'megaphi[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS", "this machine")
            raise RunError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from None
    return ray


class RayExecutor:
    """See the module's text.

    Args:
        address: see `connect`.
        workers: shards at a time; None for the processors of the cluster.
    """

    name = "ray"
    shared = False

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self._ray = connect(address)
        self._workers = workers

    @property
    def workers(self) -> int:
        """Shards at a time: as asked for, or the processors that the cluster has now."""
        return self._workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def select(self, missing: Sequence[int]) -> list[int]:
        """All of them."""
        return list(missing)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield `function(task)` of each task, in the order of the tasks.

        Raises:
            RunError: a shard was lost more than `MAX_RETRIES` times, or a node is not set up.
            Exception: what `function` raised.
        """
        ray = self._ray
        remote = ray.remote(
            num_cpus=1,
            max_retries=MAX_RETRIES,
            retry_exceptions=False,
            scheduling_strategy="SPREAD",
        )(_call)
        pending: deque[Any] = deque()
        done = 0
        try:
            for task in tasks:
                pending.append(remote.remote(function, task, os.getcwd(), _versions()))
                # one waits at each processor, so that none idles while a result is fetched
                if len(pending) >= 2 * self.workers:
                    yield self._fetch(pending.popleft(), done)
                    done += 1
            while pending:
                yield self._fetch(pending.popleft(), done)
                done += 1
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def _fetch(self, reference: Any, number: int) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            raise RunError(
                f"Ray gave up shard {number} of this phase after {MAX_RETRIES} retries "
                f"({type(error).__name__}); run again to go on from there"
            ) from None
