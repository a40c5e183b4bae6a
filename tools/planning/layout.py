"""What is planned, and the ways to spread it over GPUs.

A `Layout` is wider than what `megaphi.config` accepts today: a plan may look at layouts that
cannot be run yet. `problems` holds the rules of divisibility that every layout must keep.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megaphi.config import Model


class Recompute(StrEnum):
    """Which activations the backward pass makes again."""

    NONE = "none"
    """Everything that the backward pass reads is kept."""
    SELECTIVE = "selective"
    """GELU's output is made again: a pass over memory, no matrix product."""
    FULL = "full"
    """Only a block's two inputs are kept; its forward pass runs again."""


class PipelineSchedule(StrEnum):
    """In which order the stages of a pipeline run, by the names that recipes give them."""

    ONE_F_ONE_B = "1f1b"
    """One forward, one backward (arXiv 2104.04473)."""
    INTERLEAVED = "interleaved"
    """The same, each stage holding several chunks of layers (arXiv 2104.04473)."""
    INTERLEAVED_ZERO_BUBBLE = "interleaved-zero-bubble"
    """Interleaved, weight gradients filling most of the bubble (ZB-H1 of arXiv 2401.10241)."""
    ZBV = "zbv"
    """Two chunks a stage, there and back: no bubble where all passes take equally long."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training that is planned, whatever it runs on."""

    model: Model
    sequence_length: int
    """Tokens of a sample."""
    global_batch_size: int
    """Samples of a step."""
    steps: int = 1
    """Optimizer steps of the run."""
    compute_bytes: int = 2
    """Bytes of an activation and of a gathered weight."""
    kernels: Literal["triton", "torch"] = "triton"
    """Which implementation of the operations runs (`MEGAPHI_KERNELS`)."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all GPUs."""
        return self.global_batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to spread a job; mesh order, outer to inner: pipeline, data, context, tensor."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    micro_batch_size: int = 8
    reshard_after_forward: bool = False
    recompute: Recompute = Recompute.NONE
    schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B
    chunks: int = 1
    """Parts of the model on one GPU: 1 with 1f1b, 2 with zbv, at least 2 interleaved."""

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def shards(self) -> int:
        """Processes that share master weights, gradients and moments: data x context."""
        return self.data * self.context

    def micro_batches(self, job: Job) -> int:
        """Micro-batches of a step on each GPU."""
        return job.global_batch_size // (self.micro_batch_size * self.data)

    def tokens(self, job: Job) -> int:
        """Tokens of a micro-batch in one tensor-parallel group."""
        return self.micro_batch_size * job.sequence_length // self.context

    @property
    def head_stage(self) -> int:
        """Pipeline rank of the head: the last, with zbv the first, which has both ends."""
        return 0 if self.schedule is PipelineSchedule.ZBV else self.pipeline - 1

    def stage_layers(self, job: Job) -> int:
        """Blocks of one pipeline stage."""
        return job.model.num_layers // self.pipeline


def problems(job: Job, layout: Layout, gpus_per_node: int = 8) -> list[str]:
    """Why a layout cannot hold a job; empty when it can."""
    model, found = job.model, []

    def check(good: bool, text: str) -> None:
        if not good:
            found.append(text)

    tensor, context, pipeline = layout.tensor, layout.context, layout.pipeline
    for name, size in (
        ("model.num_heads", model.num_heads),
        ("the MLP's width", model.ffn_size),
        ("model.vocab_size", model.vocab_size),
    ):
        check(size % tensor == 0, f"{name}={size} is not a multiple of tensor={tensor}")
    check(
        gpus_per_node % tensor == 0 or tensor == 1,
        f"tensor={tensor} does not divide the {gpus_per_node} GPUs of a node",
    )
    # causal context parallelism gives each GPU one early and one late piece of the sequence
    pieces = 2 * context * tensor if context > 1 else tensor
    check(
        job.sequence_length % pieces == 0,
        f"data.sequence_length={job.sequence_length} is not a multiple of {pieces} "
        f"(context={context}, tensor={tensor})",
    )
    parts = pipeline * layout.chunks
    check(
        model.num_layers % parts == 0,
        f"model.num_layers={model.num_layers} is not a multiple of {parts} "
        f"(pipeline={pipeline}, chunks={layout.chunks}); a plan cuts evenly",
    )
    per_pass = layout.micro_batch_size * layout.data
    check(
        job.global_batch_size % per_pass == 0,
        f"train.global_batch_size={job.global_batch_size} is not a multiple of {per_pass} "
        f"(train.micro_batch_size={layout.micro_batch_size} x data={layout.data})",
    )
    count = layout.micro_batches(job)
    check(
        pipeline == 1 or count >= pipeline,
        f"{count} micro-batches a step do not fill pipeline={pipeline}",
    )
    schedule, chunks = layout.schedule, layout.chunks
    one, folded = schedule is PipelineSchedule.ONE_F_ONE_B, schedule is PipelineSchedule.ZBV
    check(
        chunks == 1 if one else chunks == 2 if folded else chunks > 1,
        f"{schedule} with chunks={chunks}: 1f1b has 1, zbv has 2, interleaved more than 1",
    )
    check(
        one or folded or (pipeline > 1 and count % pipeline == 0),
        f"{schedule} needs micro-batches a step ({count}) in multiples of pipeline={pipeline}",
    )
    return found


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def search(job: Job, gpus: int, gpus_per_node: int = 8) -> Iterator[Layout]:
    """Every layout on so many GPUs that `problems` accepts, micro-batches in powers of two."""
    micro_batch_sizes = [2**i for i in range(8)]
    for pipeline in divisors(math.gcd(gpus, job.model.num_layers)):
        schedules = [(PipelineSchedule.ONE_F_ONE_B, 1)]
        if pipeline > 1:
            schedules.append((PipelineSchedule.ZBV, 2))
            for chunks in (2, 3, 4):
                schedules.append((PipelineSchedule.INTERLEAVED, chunks))
                schedules.append((PipelineSchedule.INTERLEAVED_ZERO_BUBBLE, chunks))
        for tensor in divisors(math.gcd(gpus // pipeline, job.model.num_heads)):
            for context in divisors(gpus // (pipeline * tensor)):
                data = gpus // (pipeline * tensor * context)
                for size in micro_batch_sizes:
                    for schedule, chunks in schedules:
                        for recompute in Recompute:
                            for reshard in (False, True):
                                layout = Layout(
                                    pipeline=pipeline,
                                    data=data,
                                    context=context,
                                    tensor=tensor,
                                    micro_batch_size=size,
                                    reshard_after_forward=reshard,
                                    recompute=recompute,
                                    schedule=schedule,
                                    chunks=chunks,
                                )
                                if not problems(job, layout, gpus_per_node):
                                    yield layout
