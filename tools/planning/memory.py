"""Bytes of GPU memory that a step of a layout needs, by kind, on the fullest GPU.

Activations are those that the operations of `megaphi.model.phi` keep for the backward pass; the
tests count the saved tensors of real models against `block_saved_bytes`, so that a change of the
model that keeps more fails there. Of one block and one token, with d the width, f the MLP's, h
the heads and e the bytes of a number:

    LayerNorm's output d e, packed q, k, v 3 d e, attention's output d e and its log-sums 4 h,
    before and after the GELU 2 f e, the residual stream d e, LayerNorm's mean and 1/std 8

Dropout masks are drawn again; only the plain definitions (`kernels.reference`) keep two in fp32.
Weights, gradients and optimizer state follow FSDP2 as `megaphi.training.parallelize` sets it up.
What no test here measures is marked [E], an estimate: temporaries, communication, reserve.
"""

import functools
import math
from dataclasses import dataclass

from megaphi.config import Model
from megaphi.model.phi import parameter_shapes
from tools.planning.layout import Job, Layout, PipelineSchedule, Recompute

GIB = 2**30
CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA context, loaded kernels, cuBLAS workspaces [E]."""
NCCL_BYTES = int(0.75 * GIB)
"""NCCL's buffers, where there is more than one GPU [E]."""
FRAGMENTATION = 0.05
"""Share of PyTorch's memory that its allocator holds and cannot use [E]."""
LOSS_CHUNK_ROWS = 4096
"""Rows whose logits exist at a time on a GPU (`kernels.ops.linear_cross_entropy`)."""
_SPLIT_OUTPUTS = ("qkv.weight", "qkv.bias", "fc1.weight", "fc1.bias", "head.weight", "head.bias")
_SPLIT_INPUTS = ("out.weight", "fc2.weight")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by kind on one GPU; `total` is the peak of the backward pass or of the update."""

    stage: int
    """Pipeline stage of this GPU."""
    weights: int
    """Gathered weights in the compute format."""
    master: int
    """fp32 weights, this GPU's share."""
    gradients: int
    """fp32 gradients: whole while micro-batches add up, else this GPU's share."""
    moments: int
    """fp32 moments of AdamW, this GPU's share."""
    activations: int
    """What the forward passes in flight keep for their backward passes."""
    temporaries: int
    """Of the block that is in work [E], and its activations where they are recomputed."""
    loss: int
    """Logits in chunks and the gradients of the head that the forward pass makes."""
    communication: int
    """Buffers of collectives [E]."""
    reserve: int
    """CUDA context, NCCL, and the allocator's fragmentation [E]."""
    update: int
    """All of the optimizer step, when activations are gone; it may be the larger peak."""

    @property
    def kinds(self) -> dict[str, int]:
        """The parts of the backward pass's peak."""
        return {n: size for n, size in vars(self).items() if n not in ("stage", "update")}

    @property
    def total(self) -> int:
        """Peak bytes."""
        return max(sum(self.kinds.values()), self.update)


def memory_plan(job: Job, layout: Layout) -> MemoryPlan:
    """Memory of the fullest GPU: the first stage holds most micro-batches, the last the head."""
    stages = sorted({0, layout.pipeline - 1})
    return max((stage_memory(job, layout, stage) for stage in stages), key=lambda plan: plan.total)


def stage_memory(job: Job, layout: Layout, stage: int) -> MemoryPlan:
    """Memory of a GPU of one pipeline stage."""
    groups = stage_groups(job.model, layout.pipeline, layout.tensor, stage, layout.head_stage)
    whole = [sum(map(math.prod, group)) for group in groups]
    held, largest = sum(whole), max(whole)
    share = sum(_shard_size(shape, layout.shards) for group in groups for shape in group)
    width = job.compute_bytes
    in_flight = micro_batches_in_flight(job, layout, stage)
    accumulates = layout.micro_batches(job) > 1
    saved = stage_saved_bytes(job, layout, stage)
    parts = {
        # freed weights: the group in work and the one that is gathered ahead
        "weights": width * (min(held, 2 * largest) if layout.reshard_after_forward else held),
        "master": 4 * share,
        "gradients": 4 * held if accumulates or layout.shards == 1 else 4 * (share + largest),
        "moments": 8 * share,
        "activations": math.ceil(saved * in_flight),
        "temporaries": temporary_bytes(job, layout),
        "loss": loss_bytes(job, layout) if stage == layout.head_stage else 0,
        "communication": communication_bytes(job, layout, largest),
    }
    fixed = CONTEXT_BYTES + (NCCL_BYTES if layout.gpus > 1 else 0)
    # the plain update has a second and a third copy of every parameter
    update = share * (4 + 8 + 4 + (0 if job.kernels == "triton" else 8))
    return MemoryPlan(
        stage=stage,
        reserve=fixed + int(FRAGMENTATION * sum(parts.values())),
        update=fixed + int((1 + FRAGMENTATION) * update),
        **parts,
    )


@functools.lru_cache(maxsize=256)
def stage_groups(
    model: Model, pipeline: int, tensor: int, stage: int, head_stage: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Shapes of a tensor-parallel rank's parameters, in the groups that are gathered as one.

    Every stage has equally many blocks, and all blocks are alike, so that it does not matter which.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    layers = model.num_layers // pipeline
    for name, shape in parameter_shapes(model).items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            index = int(rest.split(".")[0])
            here, group = stage * layers <= index < (stage + 1) * layers, f"block {index}"
        else:
            here, group = stage == (0 if part == "embedding" else head_stage), part
        if here:
            groups.setdefault(group, []).append(_tensor_part(name, shape, tensor))
    return tuple(tuple(group) for group in groups.values())


def _tensor_part(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel rank's part; vectors of the residual stream stay whole."""
    if name.endswith(_SPLIT_INPUTS):
        return shape[0], shape[1] // tensor
    if name.endswith((*_SPLIT_OUTPUTS, "tokens.weight")):
        return shape[0] // tensor, *shape[1:]
    return shape


def _shard_size(shape: tuple[int, ...], shards: int) -> int:
    """Elements of the largest of FSDP2's shards, which are cut along the first dimension."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:])


def micro_batches_in_flight(job: Job, layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of its whole depth."""
    count, stages = layout.micro_batches(job), layout.pipeline
    if stages == 1:
        return 1.0
    if layout.schedule is PipelineSchedule.ONE_F_ONE_B:
        return float(min(stages - stage, count))
    if layout.schedule is PipelineSchedule.ZBV:
        # every process as many as 1F1B's first
        return float(min(stages, count))
    # where weight gradients wait, later stages start as many as the first
    before = 0 if layout.schedule is PipelineSchedule.INTERLEAVED_ZERO_BUBBLE else stage
    chunk_passes = 2 * (stages - before - 1) + (layout.chunks - 1) * stages + 1
    return min(chunk_passes, count * layout.chunks) / layout.chunks


def block_saved_bytes(job: Job, recompute: Recompute = Recompute.NONE) -> int:
    """Bytes that one block keeps for one token, without tensor parallelism."""
    model, e = job.model, job.compute_bytes
    d, f = model.hidden_size, model.ffn_size
    if recompute is Recompute.FULL:
        return 2 * d * e
    saved = (6 * d + 2 * f) * e + 4 * model.num_heads + 8
    if recompute is Recompute.SELECTIVE:
        saved -= f * e
    if job.kernels == "torch" and _drops(model):
        saved += 2 * 4 * d
    return saved


def stage_saved_bytes(job: Job, layout: Layout, stage: int) -> float:
    """Bytes that one micro-batch keeps on a stage, without the loss's own."""
    tokens = layout.tokens(job)
    saved = tokens * layout.stage_layers(job) * block_saved_bytes(job, layout.recompute)
    if stage == 0:
        # the embedding's output and its LayerNorm's statistics; the ids are int64
        kept = 0 if layout.recompute is Recompute.FULL else job.model.hidden_size
        saved += tokens * (kept * job.compute_bytes + 8)
        return saved / layout.tensor + 8 * tokens
    return saved / layout.tensor


def _drops(model: Model) -> bool:
    """Whether the residual branches have dropout."""
    return model.residual_dropout > 0


def loss_kept_bytes(job: Job, layout: Layout) -> int:
    """Gradients of the head's input, weight and bias, which its forward pass makes."""
    vocabulary, d = job.model.vocab_size // layout.tensor, job.model.hidden_size
    return job.compute_bytes * (layout.tokens(job) * d + vocabulary * (d + 1))


def loss_bytes(job: Job, layout: Layout) -> int:
    """The head's gradients, and the larger of what its two passes need in addition.

    The forward pass has a chunk of logits and the weight's gradient in fp32; the backward pass
    scales that gradient in fp32: two such copies and the result.
    """
    e, tokens = job.compute_bytes, layout.tokens(job)
    vocabulary = job.model.vocab_size // layout.tensor
    weight = vocabulary * job.model.hidden_size
    # the plain definition: logits as they come, in fp32, and a copy inside logsumexp
    logit = e if job.kernels == "triton" else e + 8
    forward = logit * min(LOSS_CHUNK_ROWS, tokens) * vocabulary + 4 * weight
    backward = (8 + e) * weight
    return loss_kept_bytes(job, layout) + max(forward, backward)


def temporary_bytes(job: Job, layout: Layout) -> int:
    """What a block needs beyond what it keeps [E].

    Gradients: of the MLP's inner layer twice, of the attention's packed input twice (the rotary
    backward writes a new one), its output, both branches and the stream. The plain definition of
    dropout works in int64 on every element.
    """
    d, f, e = job.model.hidden_size, job.model.ffn_size, job.compute_bytes
    per_token = max(4 * d + 2 * f, 10 * d) * e
    if job.kernels == "torch" and _drops(job.model):
        per_token = max(per_token, 48 * d)
    if layout.recompute is Recompute.FULL:
        per_token += block_saved_bytes(job)
    elif layout.recompute is Recompute.SELECTIVE:
        per_token += f * e
    return math.ceil(layout.tokens(job) * per_token / layout.tensor)


def communication_bytes(job: Job, layout: Layout, largest_group: int) -> int:
    """Buffers of the collectives [E].

    Data: gathering flattens a group of weights while the next is under way; so does the reduction
    of fp32 gradients. Tensor: the block's whole input and its gradient. Context: keys and values
    of a neighbour, twice.
    """
    e, d = job.compute_bytes, job.model.hidden_size
    buffers = 0
    if layout.shards > 1:
        gather, reduce = 2 * e * largest_group, 2 * 4 * largest_group
        buffers += gather + reduce if layout.reshard_after_forward else max(gather, reduce)
    if layout.tensor > 1:
        buffers += 2 * e * d * layout.tokens(job)
    if layout.context > 1:
        buffers += 2 * e * 2 * d * layout.tokens(job) // layout.tensor
    return buffers
