"""Context parallelism: each process holds a part of every sequence and gathers the keys and values.

A sequence is cut into 2 x size chunks, of which process r holds chunk r and chunk 2 size - 1 - r:
under a causal mask a late chunk sees many keys and an early one few, and any such pair sees equally
many. Everything but the attention works on tokens one by one. Keys and values are gathered rather
than passed around a ring (Llama 3, arXiv 2407.21783, section 3.3.2): their size is small
compared with the attention's work, and any attention kernel serves, since the last query of a chunk
stands at the last key that it is given.

Suffixes: b batch, t time (this process's part), s time (whole), h heads, k elements of a head.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.ops import DropoutSeed


@dataclass(frozen=True)
class ContextAxis:
    """The context axis as the model sees it; of length 1 it does nothing."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of a sequence that this process holds, of 2 x size."""
        return self.rank, 2 * self.size - 1 - self.rank

    def cut(self, whole_bs: Tensor) -> Tensor:
        """This process's part along dimension 1."""
        if self.size == 1:
            return whole_bs
        parts = whole_bs.chunk(2 * self.size, dim=1)
        return torch.cat([parts[chunk] for chunk in self.chunks], dim=1)

    def positions(self, num_local: int, device: torch.device) -> Tensor:
        """int64 [t]: positions in the sequence of this process's tokens."""
        return self.cut(torch.arange(num_local * self.size, device=device)[None])[0]

    def gather(self, part_bt: Tensor) -> Tensor:
        """The whole sequences, in order; their gradients are added up and cut."""
        whole_bs: Tensor = _Gather.apply(part_bt, self)  # type: ignore[no-untyped-call]
        return whole_bs

    def _order(self) -> list[int]:
        """Where chunk c stands among the chunks of all processes, one process after another."""
        held = [chunk for r in range(self.size) for chunk in (r, 2 * self.size - 1 - r)]
        return [held.index(chunk) for chunk in range(2 * self.size)]


class _Gather(torch.autograd.Function):
    """All-gather along the sequence; backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part_bt: Tensor, axis: ContextAxis) -> Tensor:
        """Whole sequences."""
        ctx.axis = axis
        # time first, so that the parts of the processes are rows of one buffer
        part_tb = part_bt.transpose(0, 1).contiguous()
        whole_sb = part_tb.new_empty(part_tb.shape[0] * axis.size, *part_tb.shape[1:])
        dist.all_gather_into_tensor(whole_sb, part_tb, group=axis.group)
        chunks = whole_sb.chunk(2 * axis.size)
        return torch.cat([chunks[index] for index in axis._order()]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_bs: Tensor) -> tuple[Tensor, None]:
        """Sum of all processes' gradients of this process's part."""
        axis = ctx.axis
        chunks = grad_bs.transpose(0, 1).chunk(2 * axis.size)
        order = axis._order()
        by_process = torch.cat([chunks[order.index(chunk)] for chunk in range(2 * axis.size)])
        grad_tb = by_process.new_empty(len(by_process) // axis.size, *by_process.shape[1:])
        dist.reduce_scatter_tensor(grad_tb, by_process.contiguous(), group=axis.group)
        return grad_tb.transpose(0, 1), None


def attention_over_context(
    axis: ContextAxis,
    query_bthk: Tensor,
    key_bthk: Tensor,
    value_bthk: Tensor,
    dropout: DropoutSeed | None,
    attend: Callable[[Tensor, Tensor, Tensor, DropoutSeed | None], Tensor],
) -> Tensor:
    """Attention of this process's queries to the keys of the whole sequence.

    Args:
        axis: the context axis.
        query_bthk: this process's queries.
        key_bthk: this process's keys.
        value_bthk: this process's values.
        dropout: position of this process's rows in the run's random numbers.
        attend: causal attention of [b, h, t, k] tensors, the last query at the last key.

    Returns:
        [b, h, t, k].
    """
    if axis.size == 1:
        query_bhtk, key_bhtk = query_bthk.transpose(1, 2), key_bthk.transpose(1, 2)
        return attend(query_bhtk, key_bhtk, value_bthk.transpose(1, 2), dropout)
    both_bschk = axis.gather(torch.stack((key_bthk, value_bthk), dim=2))
    key_bhsk, value_bhsk = (part.transpose(1, 2) for part in both_bschk.unbind(dim=2))
    length = query_bthk.shape[1] // 2
    attended = []
    for piece, chunk in enumerate(axis.chunks):
        rows, end = slice(piece * length, (piece + 1) * length), (chunk + 1) * length
        dropout_of_rows = None
        if dropout is not None:
            assert dropout.tokens_n is not None
            tokens_bt = dropout.tokens_n.view(query_bthk.shape[:2])
            dropout_of_rows = dataclasses.replace(dropout, tokens_n=tokens_bt[:, rows].flatten())
        query_bhtk = query_bthk[:, rows].transpose(1, 2)
        keys = (key_bhsk[:, :, :end], value_bhsk[:, :, :end])
        attended.append(attend(query_bhtk, *keys, dropout_of_rows))
    return torch.cat(attended, dim=2)
