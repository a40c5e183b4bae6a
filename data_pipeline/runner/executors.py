"""Where the shards of a stage run: processes of this machine, a Ray cluster, or a Slurm array.

Every parallel phase of every stage goes through `run_shards`: shard i writes into directory i of
the work directory, and shards that are done are not run again. An `Executor` decides which of the
others this process runs, and where. The output is the same to the byte whatever the executor, the
number of workers, and how often any of them was killed.

On several machines the work directory, which is alongside the output, must be in a file system that
all of them share under the same path, with locks (`flock`) that hold across machines.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from data_pipeline.runner.options import EngineOptions
from data_pipeline.runner.output import WorkDirectory
from data_pipeline.runner.pool import run_tasks

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """A way of running shards."""

    @property
    def name(self) -> str:
        """As the engine's option names it."""
        ...

    @property
    def workers(self) -> int:
        """Shards at a time."""
        ...

    @property
    def shared(self) -> bool:
        """Other processes work in the same work directory at the same time."""
        ...

    def select(self, missing: Sequence[int]) -> list[int]:
        """Of the shards that are not done yet, those that are run here.

        Raises:
            ShardsPlanned: none is: they have been counted and are run elsewhere.
        """
        ...

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield `function(task)` of each task, in the order of the tasks.

        Args:
            function: a module-level function; it and the tasks are sent to other processes.
            tasks: the work. Each may be started more than once, even at the same time.

        Raises:
            RunError: a worker was lost for good.
            Exception: what `function` raised.
        """
        ...


class ShardsLeft(Exception):
    """The stage stops here without an output: other processes have shards to do."""


@dataclass
class SliceDone(ShardsLeft):
    """A slice of an array has done its shards of the first parallel phase.

    Attributes:
        done: shards that it ran; the others of its slice were done before.
        total: shards of the phase.
    """

    done: int
    total: int


@dataclass
class ShardsPlanned(ShardsLeft):
    """The work directory is prepared for an array.

    Attributes:
        missing: shards of the first parallel phase that are not done.
    """

    missing: int


@dataclass(frozen=True)
class LocalExecutor:
    """Processes of this machine; see `data_pipeline.runner.pool`."""

    workers: int = 1
    name: str = "local"
    shared: bool = False

    def select(self, missing: Sequence[int]) -> list[int]:
        """All of them."""
        return list(missing)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `run_tasks`."""
        return run_tasks(function, tasks, self.workers)


@dataclass(frozen=True)
class SliceExecutor(LocalExecutor):
    """One of several processes that share the first parallel phase of a stage.

    Which shards are its own depends on their numbers alone, not on what the others have done
    meanwhile. It leaves the later phases, and publishing, to a run without a slice.

    Attributes:
        index: which slice this is, from 0.
        slices: how many there are.
    """

    index: int = 0
    slices: int = 1
    name: str = "slice"
    shared: bool = True

    def select(self, missing: Sequence[int]) -> list[int]:
        """Every `slices`-th shard, from `index` on."""
        return [number for number in missing if number % self.slices == self.index]


@dataclass(frozen=True)
class PlanExecutor:
    """Prepares the work directory for an array of slices, and runs nothing."""

    workers: int = 1
    name: str = "slurm"
    shared: bool = False

    def select(self, missing: Sequence[int]) -> list[int]:
        """See `Executor`."""
        raise ShardsPlanned(len(missing))

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Never called: `select` gives it no shard."""
        raise AssertionError("a plan runs nothing")


def executor_of(engine: EngineOptions) -> Executor:
    """The executor that the options ask for.

    Raises:
        ValueError: Ray is not installed.
        RunError: there is no Ray cluster.
    """
    if engine.engine == "ray":
        from data_pipeline.runner.ray_executor import RayExecutor

        return RayExecutor(engine.ray_address, engine.workers)
    workers = engine.workers or cores()
    if engine.engine == "slurm":
        return PlanExecutor(workers)
    if engine.slice is not None:
        index, slices = map(int, engine.slice.split("/"))
        return SliceExecutor(workers, index=index, slices=slices)
    return LocalExecutor(workers)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def run_shards(
    function: Callable[[Task], dict[str, Any]],
    tasks: Sequence[Task],
    work: WorkDirectory,
    executor: Executor,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run the shards of a phase that are not done yet.

    Args:
        function: runs a shard, and leaves its files and result in its directory with
            `start_shard` and `finish_shard`.
        tasks: of all shards; task i writes into `work.shard_directory(i)`.
        work: the work directory.
        executor: how they are run.
        on_shard: called after each shard with (shards done, shards in all).

    Returns:
        The results of all shards, in order.

    Raises:
        ShardsLeft: the executor leaves shards to others.
        RunError: a worker was lost for good.
        Exception: what `function` raised.
    """
    results = [work.finished(index) for index in range(len(tasks))]
    missing = [index for index, result in enumerate(results) if result is None]
    mine = executor.select(missing)
    done = len(results) - len(missing)
    for index, result in zip(
        mine, executor.run(function, [tasks[index] for index in mine]), strict=True
    ):
        work.await_shard(index)
        results[index] = result
        done += 1
        on_shard(done, len(results))
    if executor.shared:
        raise SliceDone(len(mine), len(tasks))
    complete = [result for result in results if result is not None]
    assert len(complete) == len(tasks)
    return complete
