"""What lets training go on while a checkpoint is written: a snapshot on the host, and a thread.

The thread writes from the snapshot alone, so that training may overwrite its tensors at once. It
talks to the other processes over the group that only checkpoints use, never over training's.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from megaphi.device import is_gpu, use
from megaphi.errors import RunError


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Staging:
    """Host memory for one snapshot of this process's shards, allocated once for the whole run.

    On a GPU the memory is pinned, and copies are queued behind the step that made the values: the
    host does not wait for them, and the next step's kernels queue behind them.

    Args:
        tensors: what will be saved, by checkpoint name; their shapes stay.
        device: where they are.

    Raises:
        RunError: there is not enough host memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        pinned = is_gpu(device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        try:
            self._buffers = {
                name: torch.empty(_local(t).shape, dtype=t.dtype, pin_memory=pinned)
                for name, t in tensors.items()
            }
        except (RuntimeError, MemoryError) as error:
            needed = sum(_local(t).nbytes for t in tensors.values()) / 2**30
            raise RunError(
                f"no {needed:.1f} GiB of host memory on this process for the snapshot of a "
                "checkpoint; free some, or use checkpoint.asynchronous=false"
            ) from error

    @property
    def bytes(self) -> int:
        """Size of the snapshot."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values that tensors have now; those of the last snapshot are gone."""
        for name, buffer in self._buffers.items():
            buffer.copy_(_local(tensors[name]), non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record()

    def planner(self) -> DefaultSavePlanner:
        """What makes torch.distributed.checkpoint write the snapshot in place of the tensors."""
        if self._copied is not None:
            self._copied.synchronize()
        return _SnapshotPlanner(self._buffers)


class _SnapshotPlanner(DefaultSavePlanner):
    """Plans by the tensors that training continues with, and takes their data from a snapshot."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._buffers = buffers

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """This process's shard; it has one of each tensor."""
        return self._buffers[index.fqn]


class Background:
    """A thread that does one job at a time; a job's error is raised where it is waited for."""

    def __init__(self, device: torch.device) -> None:
        # a new thread would otherwise open the first GPU, whichever is this process's
        self._executor = ThreadPoolExecutor(1, "checkpoint", initializer=lambda: use(device))
        self._job: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is being done."""
        return self._job is not None and not self._job.done()

    @property
    def failed(self) -> bool:
        """Whether the last job has ended with an error that nobody has seen yet."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def start(self, job: Callable[[], Any]) -> None:
        """Do a job; the one before must have been waited for."""
        assert self._job is None, "two jobs at once"
        self._job = self._executor.submit(job)

    def wait(self) -> None:
        """Wait for the job, if there is one, and raise its error."""
        if self._job is not None:
            self._job.exception()  # an interrupt of this wait leaves the job to wait for again
            job, self._job = self._job, None
            job.result()

    def close(self) -> None:
        """Wait for the job and end the thread; an error stays unraised."""
        self._executor.shutdown()
