"""Pipeline parallelism: the blocks cut into stages, on PyTorch's schedules.

A stage is a `Phi` that has some of the blocks, under the names that they have in the whole model.
`torch.distributed.pipelining` decides when which stage runs which micro-batch and moves what is
between them: LayerNorm(r) and r. Its schedules:

    1f1b                    one stage a process (Narayanan et al., arXiv 1806.03377)
    interleaved             several stages a process, in a loop (arXiv 2104.04473)
    interleaved-zero-bubble the same, with the weights' gradients put into the gaps
    zbv                     two stages a process, there and back (Qi et al., arXiv 2401.10241)

Suffixes: b batch, t time, n rows, d hidden width.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.torch_version import TorchVersion

from kernels.ops import DropoutSeed
from megaphi.config import Model, Parallel, Recipe
from megaphi.data.loader import MicroBatch
from megaphi.model.phi import Phi
from megaphi.parallel.mesh import Mesh

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
_SPLIT_BACKWARD = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)
"""Schedules that ask for the gradients of inputs and of weights in passes of their own."""


def split_layers(config: Model, num_stages: int) -> list[range]:
    """Cut the blocks into stages whose slowest is as fast as possible.

    The head costs as much as its share of the products; the embedding costs nothing.

    Raises:
        ValueError: there are more stages than blocks.
    """
    layers = config.num_layers
    if num_stages > layers:
        raise ValueError(
            f"{num_stages} pipeline stages for model.num_layers={layers}; use at most {layers}"
        )
    d = config.hidden_size
    head = config.vocab_size * d / (4 * d * d + 2 * d * config.ffn_size)
    # fewest blocks for the last stage that do not make another one the slowest
    best: list[int] = []
    for last in range(1, layers - num_stages + 2):
        others = _evenly(layers - last, num_stages - 1)
        sizes = [*others, last]
        if not best or _slowest(sizes, head) < _slowest(best, head):
            best = sizes
    starts = [sum(best[:stage]) for stage in range(num_stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _evenly(total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` numbers that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)] if parts else []


def _slowest(sizes: Sequence[int], head: float) -> float:
    """Cost of the most expensive stage, in blocks."""
    return max([*sizes[:-1], sizes[-1] + head])


def stages_of_process(parallel: Parallel, rank: int) -> list[int]:
    """The numbers of the stages that a process of the pipeline axis runs."""
    size = parallel.pipeline
    if parallel.pipeline_schedule == "zbv":
        return [rank, 2 * size - 1 - rank]
    return list(range(rank, parallel.num_stages, size))


class StageModel(Phi):
    """A part of the decoder, as a schedule runs it."""

    micro_batch: Callable[[int], tuple[torch.Size, DropoutSeed | None]]
    """Shape of the tokens [b, t] and position in the run's random numbers of a micro-batch."""

    def begin(self, micro_batch: Callable[[int], tuple[torch.Size, DropoutSeed | None]]) -> None:
        """Start a step, whose micro-batches come one after another from 0 on."""
        self.micro_batch = micro_batch
        self.next_micro_batch = 0

    def forward(  # type: ignore[override]
        self, *inputs: Tensor, labels_bt: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the stage on the next micro-batch.

        Args:
            inputs: token ids [b, t], or LayerNorm(r) and r [n, d] of the stage before.
            labels_bt: next tokens; the last stage uses them.

        Returns:
            LayerNorm(r) and r, or of the last stage the fp32 sum of the tokens' losses.
        """
        shape, dropout = self.micro_batch(self.next_micro_batch)
        self.next_micro_batch += 1
        batch = self.describe(shape, inputs[0].device, dropout)
        outputs = self.run(inputs, batch, labels_bt)
        if self.head is not None:
            return outputs[0]
        normed_nd, residual_nd = outputs
        # zero-bubble schedules detach what a stage returns; LayerNorm has saved its own input
        return normed_nd, residual_nd.clone()


class Pipeline:
    """The stages of this process and the schedule that runs them."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, stages: list[StageModel], compute_dtype: torch.dtype
    ) -> None:
        self._mesh = mesh
        self._stages = stages
        self._numbers = stages_of_process(recipe.parallel, mesh.axis_rank("pipeline"))
        self._num_stages = recipe.parallel.num_stages
        self._shape = torch.Size((recipe.train.micro_batch_size, recipe.data.sequence_length))
        rows = self._shape.numel() // (recipe.parallel.context * recipe.parallel.tensor)
        self._between = torch.Size((rows, recipe.model.hidden_size))
        self._dtype = compute_dtype
        self._v_shaped = recipe.parallel.pipeline_schedule == "zbv"
        self._num_micro_batches = recipe.micro_batches(mesh.data_size)
        parts = [
            self._part(stage, number) for stage, number in zip(stages, self._numbers, strict=True)
        ]
        kind = SCHEDULES[recipe.parallel.pipeline_schedule]
        if kind in _SPLIT_BACKWARD and torch.__version__ < TorchVersion("2.13"):
            raise ValueError(
                f"parallel.pipeline_schedule={recipe.parallel.pipeline_schedule} needs PyTorch "
                f"2.13 or newer, this is {torch.__version__}: earlier ones cannot split the "
                "backward pass of our operations; use 1f1b or interleaved"
            )
        self.schedule = kind(
            parts[0] if kind is Schedule1F1B else parts,
            self._num_micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def _part(self, stage: StageModel, number: int) -> PipelineStage:
        """A stage with the shapes of what it takes and gives."""
        tokens = torch.empty(self._shape, dtype=torch.int64, device="meta")
        between = torch.empty(self._between, dtype=self._dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            number,
            self._num_stages,
            self._mesh.device,
            input_args=(tokens,) if number == 0 else (between, between),
            output_args=(loss,) if number == self._num_stages - 1 else (between, between),
            group=self._mesh.group("pipeline"),
        )

    def bubble(self) -> float:
        """Share of the time in which a process is idle, if all slots take equally long."""
        if isinstance(self.schedule, Schedule1F1B):
            return (self._num_stages - 1) / (self._num_micro_batches + self._num_stages - 1)
        order = self.schedule.pipeline_order
        length = max(len(slots) for slots in order.values())
        busy = [sum(slot is not None for slot in slots) for slots in order.values()]
        return 1.0 - sum(busy) / (length * len(busy))

    def step(
        self,
        batches: Sequence[MicroBatch],
        seeds: Sequence[DropoutSeed],
        scale: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Forward and backward of a step's micro-batches.

        Args:
            batches: the micro-batches.
            seeds: their positions in the run's random numbers.
            scale: from the sum of a micro-batch's losses to what is differentiated.

        Returns:
            The sum of the scaled losses, fp32 scalar; 0 where the last stage is elsewhere.
        """
        for stage in self._stages:
            stage.begin(lambda number: (self._shape, seeds[number]))
        self.schedule._loss_fn = lambda loss, _: scale(loss)
        tokens_bt = torch.cat([batch.tokens_bt for batch in batches])
        labels_bt = torch.cat([batch.labels_bt for batch in batches])
        inputs = (tokens_bt,) if 0 in self._numbers else ()
        last = self._num_stages - 1 in self._numbers
        losses: list[Tensor] = []
        self.schedule.step(
            *inputs,
            target=labels_bt,
            losses=losses if last else None,
            return_outputs=False,
            labels_bt=labels_bt,
        )
        total = torch.zeros((), device=self._mesh.device)
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Sum of a micro-batch's losses without dropout; 0 where the last stage is elsewhere.

        The stages run one after another: whatever the schedule, no two wait for each other.
        """
        loss = torch.zeros((), device=self._mesh.device)
        passed_on: Sequence[Tensor] = ()
        last = self._num_stages - 1
        for number in range(self._num_stages):
            if number not in self._numbers:
                continue
            stage = self._stages[self._numbers.index(number)]
            stage.begin(lambda _: (self._shape, None))
            inputs: Sequence[Tensor] = passed_on
            if number == 0:
                inputs = (batch.tokens_bt,)
            elif number - 1 not in self._numbers:
                inputs = self._receive(self._owner(number - 1))
            output = stage(*inputs, labels_bt=batch.labels_bt)
            if number == last:
                loss += output
            elif number + 1 in self._numbers:
                passed_on = output
            else:
                self._send(output, self._owner(number + 1))
        return loss

    def _owner(self, number: int) -> int:
        """Global rank of the process that runs a stage."""
        size = self._mesh.axis_size("pipeline")
        turn, rank = divmod(number, size)
        # the schedule with two stages a process leads back the way it came
        if self._v_shaped and turn == 1:
            rank = size - 1 - rank
        return dist.get_global_rank(self._mesh.group("pipeline"), rank)

    def _send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Send what passes between two stages."""
        for tensor in tensors:
            dist.send(tensor.contiguous(), rank, group=self._mesh.group("pipeline"))

    def _receive(self, rank: int) -> tuple[Tensor, Tensor]:
        """Receive what passes between two stages."""
        normed_nd, residual_nd = (
            torch.empty(self._between, dtype=self._dtype, device=self._mesh.device)
            for _ in range(2)
        )
        for tensor in (normed_nd, residual_nd):
            dist.recv(tensor, rank, group=self._mesh.group("pipeline"))
        return normed_nd, residual_nd
