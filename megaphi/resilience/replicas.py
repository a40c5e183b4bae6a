"""Processes that hold the same values must go on holding the same values.

A flipped bit, a faulty device or a bug in a reduction lets copies of a parameter drift apart
without any error, and the loss looks normal for long. Which copies there are follows from the
placements of the parameters: LayerNorms and most biases are whole on every process of the tensor
axis, and with `parallel.replicate` every shard has a copy in each group.

Every tensor is hashed where it is: its bytes as 32-bit integers, each times an odd number that
depends on its position, added up modulo 2^64. One changed bit always changes the sum, for an odd
factor times a power of two below 2^32 is never 0 modulo 2^64. The sums of all tensors travel in one
all-gather for each axis of the mesh.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megaphi.errors import RunError
from megaphi.parallel.mesh import Mesh

HASH_BLOCK = 1 << 22  # elements hashed at a time: int64 temporaries of 32 MiB


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits, int64 scalar on its device; deterministic, order of sums aside.

    Integer sums do not depend on their order, so equal tensors have equal hashes anywhere.
    """
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(torch.int32) if flat.element_size() >= 4 else flat.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, block in enumerate(torch.split(words, HASH_BLOCK)):
        first = number * HASH_BLOCK
        places = torch.arange(first, first + block.numel(), device=tensor.device)
        # the factor: odd, and far from regular (Knuth's multiplicative hashing)
        total += (block.to(torch.int64) * (2 * (places * 2654435761) + 1)).sum()
    return total


def find_replicas(
    tensors: Mapping[str, Tensor],
) -> dict[dist.ProcessGroup, list[str]]:
    """Which tensors every process of a group must hold alike, by group, in the tensors' order."""
    found: dict[dist.ProcessGroup, list[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if dist.get_world_size() > 1:
                found.setdefault(dist.group.WORLD, []).append(name)  # type: ignore[arg-type]
            continue
        mesh = tensor.device_mesh
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate() and mesh.size(dim) > 1:
                found.setdefault(mesh.get_group(dim), []).append(name)
    return found


def check_replicas(tensors: Mapping[str, Tensor], mesh: Mesh, step: int) -> None:
    """Compare all copies of all tensors; every process calls this, with nothing else in flight.

    Args:
        tensors: model and optimizer by name; plain tensors must be equal on all processes.
        mesh: the processes.
        step: for the message.

    Raises:
        RunError: copies differ, on every process; names the first tensor and the processes.
    """
    if mesh.size == 1:
        return
    gathered = {}
    differs = torch.zeros((), dtype=torch.int64, device=mesh.device)
    for group, names in find_replicas(tensors).items():
        own = torch.stack([fingerprint(_local(tensors[name])) for name in names])
        table = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(table, own, group=group)
        gathered[group] = torch.stack(table)
        differs += (gathered[group] != own).any()
    if mesh.sum_(differs).item() == 0:
        return
    found = [
        _describe(names, gathered[group].tolist(), dist.get_process_group_ranks(group))
        for group, names in find_replicas(tensors).items()
    ]
    # over the group that training uses: a save in the background may be using the other
    texts: list[str | None] = [None] * mesh.size
    dist.all_gather_object(texts, next((text for text in found if text), None))
    first = next(text for text in texts if text)
    raise RunError(
        f"step {step}: {first}. A device or its memory may be faulty: check it, and run again from "
        "the newest checkpoint"
    )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _describe(names: list[str], table: list[list[int]], ranks: list[int]) -> str | None:
    """Who differs in what, or None: the processes outside of the majority, if there is one."""
    for column, name in enumerate(names):
        values = [row[column] for row in table]
        common = max(values, key=values.count)
        if values.count(common) == len(values):
            continue
        more = sum(len({row[c] for row in table}) > 1 for c in range(len(names))) - 1
        others = f" (and {more} more tensors)" if more else ""
        if 2 * values.count(common) > len(values):
            odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
            return (
                f"rank {_listed(odd)} holds another {name}{others} than the majority of the ranks "
                f"{_listed(ranks)}, which must all hold the same"
            )
        return f"ranks {_listed(ranks)} must hold the same {name}{others}, but do not"
    return None


def _listed(ranks: list[int]) -> str:
    """Ranks for people, at most eight."""
    more = ", …" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
