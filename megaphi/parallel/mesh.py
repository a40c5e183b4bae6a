"""The processes of a run: how they meet, which device each has, and the axes they form."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The processes of a run, seen from one of them.

    Only the data axis is larger than 1 so far.
    """

    device: torch.device
    """Where this process computes."""
    data: DeviceMesh
    """The data-parallel axis."""
    control: dist.ProcessGroup
    """All processes over gloo, for small messages between hosts' CPUs."""

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

    @property
    def data_rank(self) -> int:
        """Place of this process on the data axis."""
        return self.data.get_local_rank()

    @property
    def data_size(self) -> int:
        """Length of the data axis."""
        return self.data.size()

    def gather(self, value: Any) -> list[Any]:
        """Collect one small object of every process on all of them; also a barrier."""
        values: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """Main's value on every process."""
        return self.gather(value if self.is_main else None)[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over the data axis in place, without waiting for the host."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data.get_group())
        return tensor


@contextlib.contextmanager
def processes() -> Iterator[Mesh]:
    """Join the processes that torchrun started, or be the only one.

    NCCL carries tensors between GPUs, gloo between CPUs. The groups are taken down on the way out.
    """
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    backend = "nccl" if use_cuda else "gloo"
    timeout = datetime.timedelta(minutes=10)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        assert world is not None
        control = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else world
        data = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        yield Mesh(device=device, data=data, control=control)
    finally:
        dist.destroy_process_group()
