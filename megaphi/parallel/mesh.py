"""The processes of a run: how they meet, which device each has, and the axes they form.

Four axes, outer to inner: pipeline (stages of the model), data (samples), context (parts of a
sequence) and tensor (parts of a layer). Processes that are close on the inner axes talk the most,
so these are the ones that share a node.
"""

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaphi.config import Parallel
from megaphi.device import device_of_process, is_gpu, use

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The processes of a run, seen from one of them."""

    device: torch.device
    """Where this process computes."""
    grid: DeviceMesh
    """All processes, one dimension an axis."""
    shards: DeviceMesh
    """The processes that share the same weights, data and context axis as one; with
    `parallel.replicate` two dimensions: groups, and the shards inside of one."""
    control: dist.ProcessGroup
    """All processes over gloo, for small messages between hosts' CPUs about checkpoints: a thread
    may use it while training uses the others."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process reports and publishes."""
        return self.rank == 0

    def axis_rank(self, axis: str) -> int:
        """Place of this process on an axis."""
        return self.grid[axis].get_local_rank()

    def axis_size(self, axis: str) -> int:
        """Length of an axis."""
        return self.grid[axis].size()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along an axis, through this one."""
        return self.grid[axis].get_group()

    @property
    def data_rank(self) -> int:
        """Place of this process on the data axis."""
        return self.axis_rank("data")

    @property
    def data_size(self) -> int:
        """Length of the data axis."""
        return self.axis_size("data")

    @property
    def tensor_size(self) -> int:
        """Length of the tensor axis."""
        return self.axis_size("tensor")

    @property
    def num_groups(self) -> int:
        """Groups that each hold all shards of the weights."""
        return self.shards.size(0) if self.shards.ndim == 2 else 1

    def gather(self, value: Any) -> list[Any]:
        """Collect one small object of every process on all of them; also a barrier."""
        values: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """Main's value on every process."""
        return self.gather(value if self.is_main else None)[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Let main do something; its result, or its error, on every process."""
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        result, error = self.from_main((result, error))
        if error is not None:
            raise error
        return result

    def any(self, holds: bool) -> bool:
        """Whether something holds on any process; also while a thread uses `control`."""
        return bool(self.sum_(torch.tensor([float(holds)], device=self.device)).item() > 0)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes in place, without waiting for the host."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def grid_shape(parallel: Parallel, num_processes: int) -> tuple[int, int, int, int]:
    """Lengths of `AXES`; the data axis takes what the others leave.

    Raises:
        ValueError: the processes do not divide.
    """
    others = parallel.pipeline * parallel.context * parallel.tensor
    if num_processes % others:
        fitting = max(others, num_processes // others * others)
        raise ValueError(
            f"{num_processes} processes do not divide into parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} x parallel.tensor={parallel.tensor} = {others}; "
            f"start {fitting} or {fitting + others}, or change the layout"
        )
    data = num_processes // others
    if data % parallel.replicate:
        raise ValueError(
            f"parallel.replicate={parallel.replicate} does not divide the {data} data-parallel "
            f"processes; the nearest that does is {math.gcd(data, parallel.replicate)}"
        )
    return (parallel.pipeline, data, parallel.context, parallel.tensor)


def _meshes(
    device_type: str, shape: tuple[int, int, int, int], replicate: int
) -> tuple[DeviceMesh, DeviceMesh]:
    """The grid of all processes, and the mesh over which weights are sharded."""
    if replicate == 1:
        grid = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        return grid, grid["data", "context"]._flatten("shards")
    pipeline, data, context, tensor = shape
    grid = init_device_mesh(
        device_type,
        (pipeline, replicate, data // replicate, context, tensor),
        mesh_dim_names=("pipeline", "groups", "members", "context", "tensor"),
    )
    grid["groups", "members"]._flatten("data")
    grid["members", "context"]._flatten("shards")
    return grid, grid["groups", "shards"]


@contextlib.contextmanager
def processes(parallel: Parallel | None = None) -> Iterator[Mesh]:
    """Join the processes that torchrun started, or be the only one.

    NCCL carries tensors between GPUs, gloo between CPUs. The groups are taken down on the way out.

    Args:
        parallel: lengths of the axes; all on the data axis when not given.

    Raises:
        ValueError: the processes do not fit the lengths.
    """
    parallel = parallel or Parallel()
    device = device_of_process()
    use(device)
    backend = "nccl" if is_gpu(device) else "gloo"
    timeout = datetime.timedelta(minutes=10)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        shape = grid_shape(parallel, dist.get_world_size())
        control = dist.new_group(backend="gloo", timeout=timeout)
        grid, shards = _meshes(device.type, shape, parallel.replicate)
        yield Mesh(device=device, grid=grid, shards=shards, control=control)
    finally:
        dist.destroy_process_group()
