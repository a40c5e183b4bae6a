"""How long a step of a layout takes, from FLOPs, bytes moved and bytes sent.

A roofline by kind of work: matrix products and attention by achieved FLOP/s, everything else by
achieved memory bandwidth, collectives by achieved link bandwidth. The achieved rates are the
assumptions, one table a device with the source of each (`assumptions`); `calibration` holds the
model against published runs. Attention's FLOPs are the causal half, with the flash kernels'
recomputation; MFU follows `megaphi.metrics.flops`.
"""

import math
from dataclasses import dataclass

from megaphi.config import Model
from megaphi.metrics.flops import flops_per_token
from tools.planning.devices import DEVICES, Device
from tools.planning.layout import Job, Layout, PipelineSchedule, Recompute
from tools.planning.memory import LOSS_CHUNK_ROWS, stage_groups

WIDTH_KNEE = 256
"""Narrower products run slower: rate w / (w + knee), 1 at width 2,048 [E]."""
ROWS_KNEE = 384
"""So do products of few tokens: rate n / (n + knee), 1 at 16,384 tokens [E]."""
OVERLAP = 0.8
"""Share of the compute of a pass under which FSDP2's collectives can hide [E]."""

HOST_SECONDS_PER_BLOCK = 0.5e-3
"""What a host takes to launch a block's forward and backward pass, eagerly [E]. Not part of the
prediction: a block that computes for less is reported."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device achieves; shares are of the peaks of `tools.planning.devices`."""

    gemm_share: float
    attention: float
    """FLOP/s, heads of 64, causal, forward and backward."""
    attention_dropout: float
    """The same with dropout on the probabilities, which the fastest kernels lack."""
    hbm_share: float = 0.85
    link_share: float = 0.8
    network_share: float = 0.85
    source: str
    published_on: str
    """Device of the published run that stands for this one (`PUBLISHED`)."""


_A100 = Rates(
    gemm_share=0.77,
    attention=140e12,
    attention_dropout=125e12,
    hbm_share=0.82,
    link_share=0.77,
    source="estimate: cuBLAS and FlashAttention 2 at these shapes",
    published_on="a100-80gb",
)
_HOPPER = Rates(
    gemm_share=0.68,
    attention=330e12,
    attention_dropout=210e12,
    source="estimate: cuBLAS under the power limit; FlashAttention 3, with dropout cuDNN or 2",
    published_on="h100",
)
RATES = {
    "a100-40gb": _A100,
    "a100-80gb": _A100,
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": Rates(
        gemm_share=0.65,
        attention=600e12,
        attention_dropout=350e12,
        source="extrapolated from Hopper, no source",
        published_on="h100",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by kind, on the slowest pipeline stage."""

    gemm: float
    """Matrix products of the blocks and the head."""
    attention: float
    elementwise: float
    """Rotary, GELU, block ends, biases, and adding up weight gradients in memory."""
    loss: float
    """Cross-entropy over the logits, and the head's weight gradient on its way."""
    optimizer: float
    communication: float
    """What compute does not hide."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""

    @property
    def kinds(self) -> dict[str, float]:
        """All parts."""
        return dict(vars(self))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.kinds.values())


def step_time(job: Job, layout: Layout, device: Device, gpus_per_node: int = 8) -> StepTime:
    """Predict a step; `layout` must be free of `tools.planning.layout.problems`."""
    rates = RATES[device.name]
    count, tokens = layout.micro_batches(job), layout.tokens(job)
    hbm = device.hbm_bandwidth * rates.hbm_share
    gemm_rate = device.bf16_peak * rates.gemm_share * gemm_efficiency(job, layout)
    dropped = job.model.attention_dropout > 0
    attention_rate = rates.attention_dropout if dropped else rates.attention

    blocks = tokens * layout.stage_layers(job) / layout.tensor
    gemm = blocks * block_gemm_flops(job.model, layout.recompute) / gemm_rate
    attention = blocks * attention_flops(job, layout.recompute) / attention_rate
    elementwise = blocks * elementwise_bytes(job, layout.recompute) / hbm
    vocabulary = job.model.vocab_size / layout.tensor
    head = 6 * tokens * job.model.hidden_size * vocabulary / gemm_rate
    # 8 bytes a weight and micro-batch: gradients add up in fp32 inside the products
    held, share = _parameters(job, layout)
    adding = 8 * held / hbm
    exchange = tensor_and_context_seconds(job, layout, device, gpus_per_node, attention)
    exchange += stage_exchange_seconds(job, layout, device, gpus_per_node)
    micro_batch = gemm + attention + elementwise + adding + exchange

    data = data_seconds(job, layout, device, gpus_per_node, held, micro_batch)
    return StepTime(
        gemm=count * (gemm + head),
        attention=count * attention,
        elementwise=count * (elementwise + adding),
        loss=count * loss_traffic(job, layout) / hbm,
        optimizer=share * (34 if job.kernels == "triton" else 104) / hbm,
        communication=count * exchange + data,
        # the other stages lack the head: they fill and drain at their own pace
        bubble=(layout.pipeline - 1) * micro_batch * bubble_share(layout),
    )


def _parameters(job: Job, layout: Layout) -> tuple[int, float]:
    """Parameters of the largest stage's tensor-parallel rank, and its share of the update."""
    held = max(
        sum(math.prod(shape) for group in groups for shape in group)
        for groups in (
            stage_groups(job.model, layout.pipeline, layout.tensor, stage, layout.head_stage)
            for stage in {0, layout.pipeline - 1}
        )
    )
    return held, held / layout.shards


def gemm_efficiency(job: Job, layout: Layout) -> float:
    """Rate of the products relative to width 2,048 and 16,384 tokens."""
    width, rows = job.model.hidden_size / layout.tensor, layout.tokens(job)
    by_width = (width / (width + WIDTH_KNEE)) / (2048 / (2048 + WIDTH_KNEE))
    by_rows = (rows / (rows + ROWS_KNEE)) / (16384 / (16384 + ROWS_KNEE))
    return min(1.0, by_width) * min(1.0, by_rows)


def block_gemm_flops(model: Model, recompute: Recompute) -> int:
    """FLOPs of a block's products for one token, forward and backward."""
    weights = model.hidden_size * (4 * model.hidden_size + 2 * model.ffn_size)
    return (8 if recompute is Recompute.FULL else 6) * weights


def attention_flops(job: Job, recompute: Recompute) -> int:
    """Executed FLOPs of a block's causal attention for one token: 2 products, then 5."""
    one_product = job.sequence_length * job.model.hidden_size
    return one_product * (9 if recompute is Recompute.FULL else 7)


def elementwise_bytes(job: Job, recompute: Recompute) -> int:
    """Bytes that a block reads and writes for one token outside of its products and attention.

    In numbers (forward, backward), d the width and f the MLP's. Triton: rotary 2 d (for half of a
    head) and 6 d, block end 5 d and 6 d (4 d without dropout), bias + GELU 2 f and 3 f. The plain
    definitions: 14 d and 20 d, 13 d and 15 d, 2 f and 4 f. Both: gradients of the packed bias and
    of the LayerNorm's output, which two products add to, 3 d each.
    """
    model = job.model
    d, f = model.hidden_size, model.ffn_size
    if job.kernels == "triton":
        forward = int(4 * d * model.rotary_fraction) + 5 * d + 2 * f
        backward = 6 * d + (6 * d if model.residual_dropout > 0 else 4 * d) + 3 * f
    else:
        forward, backward = 27 * d + 2 * f, 35 * d + 4 * f
    again = {Recompute.NONE: 0, Recompute.SELECTIVE: 2 * f, Recompute.FULL: forward}
    return job.compute_bytes * (forward + backward + 6 * d + again[recompute])


def loss_traffic(job: Job, layout: Layout) -> float:
    """Bytes of a micro-batch's loss other than the head's products.

    A logit is read three times and written once (Triton), or passed over in fp32 (20 times its
    bytes). The weight's fp32 gradient is added to chunk by chunk, narrowed, and scaled.
    """
    vocabulary = job.model.vocab_size / layout.tensor
    tokens, plain = layout.tokens(job), job.kernels == "torch"
    logits = tokens * vocabulary * job.compute_bytes * (20 if plain else 4)
    chunks = math.ceil(tokens / LOSS_CHUNK_ROWS)
    return logits + vocabulary * job.model.hidden_size * (8 * chunks + 20)


def bubble_share(layout: Layout) -> float:
    """Bubble of a stage in units of (stages - 1) x one micro-batch.

    1F1B waits for F + B + W of each other stage; interleaved for as much of one of its chunks;
    ZB-H1 for F + B - W, zbv for F + B - 2 W: a third and nothing where the three are equally long.
    """
    shares = {PipelineSchedule.INTERLEAVED_ZERO_BUBBLE: 1 / 3, PipelineSchedule.ZBV: 0.0}
    return shares.get(layout.schedule, 1.0) / layout.chunks


def bandwidth(device: Device, gpus_per_node: int, members: int, stride: int) -> float:
    """Bytes/s a GPU of a collective achieves, ranks of the group `stride` apart.

    Rings within a node use NVLink; those over nodes are as fast as the adapters of the members
    that share a node.
    """
    rates = RATES[device.name]
    link = device.link_bandwidth * rates.link_share
    if members * stride <= gpus_per_node:
        return link
    local = max(1, gpus_per_node // stride)
    return min(link, local * device.network_bandwidth * rates.network_share)


def data_seconds(
    job: Job,
    layout: Layout,
    device: Device,
    gpus_per_node: int,
    held: int,
    micro_batch: float,
) -> float:
    """Exposed seconds a step of gathering weights and reducing gradients.

    Gathering hides under a forward pass (a third of a micro-batch), reducing fp32 gradients under
    the last backward pass; the first and last group of weights have nothing to hide under.
    """
    if layout.shards == 1:
        return 0.0
    rate = bandwidth(device, gpus_per_node, layout.shards, layout.tensor)
    part = (layout.shards - 1) / layout.shards * held / rate
    edge = 1 / (layout.stage_layers(job) + 1)

    def exposed(seconds: float, window: float) -> float:
        return max(seconds * edge, seconds - OVERLAP * window)

    gather, reduce = job.compute_bytes * part, 4 * part
    forward, backward = micro_batch / 3, micro_batch * 2 / 3
    if not layout.reshard_after_forward:
        return exposed(gather, forward) + exposed(reduce, backward)
    count = layout.micro_batches(job)
    each = exposed(gather, forward) + exposed(gather, backward)
    return (count - 1) * each + exposed(gather, forward) + exposed(gather + reduce, backward)


def tensor_and_context_seconds(
    job: Job, layout: Layout, device: Device, gpus_per_node: int, attention: float
) -> float:
    """Seconds a micro-batch waits for collectives inside its blocks.

    Tensor: a gather and a reduce-scatter of the stream in each direction and one more gather for
    the weight gradients, none hidden. Context: keys and values travel forward, they and their
    gradients backward, hidden under half of the attention.
    """
    vector = job.model.hidden_size * job.compute_bytes * layout.tokens(job)
    layers, seconds = layout.stage_layers(job), 0.0
    if layout.tensor > 1:
        rate = bandwidth(device, gpus_per_node, layout.tensor, 1)
        seconds += layers * 5 * vector * (layout.tensor - 1) / layout.tensor / rate
    if layout.context > 1:
        rate = bandwidth(device, gpus_per_node, layout.context, layout.tensor)
        sent = layers * 3 * (layout.context - 1) * 2 * vector / layout.tensor / rate
        seconds += max(0.0, sent - attention / 2)
    return seconds


def stage_exchange_seconds(job: Job, layout: Layout, device: Device, gpus_per_node: int) -> float:
    """Seconds a micro-batch takes between stages: two tensors on, their gradients back."""
    if layout.pipeline == 1:
        return 0.0
    stride = layout.gpus // layout.pipeline
    rate = bandwidth(device, gpus_per_node, 2, stride)
    vector = job.model.hidden_size * job.compute_bytes * layout.tokens(job) / layout.tensor
    return layout.chunks * 4 * vector / rate


def mfu(job: Job, layout: Layout, device: Device, seconds: float) -> float:
    """Model FLOPs utilisation, attention counted in full."""
    flops = flops_per_token(job.model, job.sequence_length) * job.tokens_per_step
    return flops / (seconds * layout.gpus * device.bf16_peak)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A measured run of another trainer on a model of phi-1's size."""

    device: str
    what: str
    tokens_per_second_per_gpu: float
    job: Job
    layout: Layout


def _mpt(device: str, rate: float, accumulation: int) -> Published:
    """MPT-1b, sequences of 2,048, 8 GPUs, micro-batches of 14, full sharding, no recomputation."""
    return Published(
        device=device,
        what="MPT-1b (1.316B), llm-foundry's benchmark table, 2023",
        tokens_per_second_per_gpu=rate,
        job=Job(
            model=Model(num_heads=16, vocab_size=50432),
            sequence_length=2048,
            global_batch_size=8 * 14 * accumulation,
            kernels="torch",
        ),
        layout=Layout(data=8, micro_batch_size=14, reshard_after_forward=True),
    )


PUBLISHED = (_mpt("a100-80gb", 20513, 4), _mpt("h100", 45455, 1))


def predicted_rate(run: Published, device: Device) -> float:
    """Tokens/s of a GPU that the model gives for a published run."""
    seconds = step_time(run.job, run.layout, device).total
    return run.job.tokens_per_step / seconds / run.layout.gpus


def calibration(device: Device) -> float:
    """Measured over predicted speed of the published run that stands for a device.

    Below 1: what the roofline leaves out (launches, gaps between kernels, copies of FSDP2) and
    software of 2023. A plan gives the speed with and without it, as a range.
    """
    run = next(run for run in PUBLISHED if run.device == RATES[device.name].published_on)
    return run.tokens_per_second_per_gpu / predicted_rate(run, DEVICES[run.device])


def assumptions(device: Device) -> list[tuple[str, str, str]]:
    """Name, value and source of every number that a prediction for a device rests on."""
    rates = RATES[device.name]
    table = [
        ("bf16 peak", f"{device.bf16_peak / 1e12:.0f} TFLOP/s", "data sheet, dense"),
        ("matrix products", f"{rates.gemm_share:.0%} of the peak", rates.source),
        ("narrow products", f"w / (w + {WIDTH_KNEE}), 1 at width 2,048", "estimate"),
        ("few tokens", f"n / (n + {ROWS_KNEE}), 1 at 16,384 tokens", "estimate"),
        ("attention", f"{rates.attention / 1e12:.0f} TFLOP/s", rates.source),
        ("attention, dropout", f"{rates.attention_dropout / 1e12:.0f} TFLOP/s", rates.source),
        (
            "memory",
            f"{rates.hbm_share:.0%} of {device.hbm_bandwidth / 1e12:.2f} TB/s",
            "data sheet; share: large copies, estimate",
        ),
        (
            "NVLink",
            f"{rates.link_share:.0%} of {device.link_bandwidth / 1e9:.0f} GB/s one way",
            "data sheet; share: NCCL's bus bandwidth, estimate",
        ),
        (
            "network",
            f"{rates.network_share:.0%} of {device.network_bandwidth / 1e9:.0f} GB/s a GPU",
            "one adapter a GPU as in DGX systems; share: estimate",
        ),
        ("data collectives hide", f"under {OVERLAP:.0%} of the pass", "estimate"),
        ("tensor collectives hide", "not at all", "lower bound of what is built"),
        (
            "host",
            f"never waited for; {1000 * HOST_SECONDS_PER_BLOCK:.1f} ms to launch a block",
            "estimate; a shorter block is warned of",
        ),
        ("context exchange hides", "under half of the attention", "estimate"),
    ]
    run = next(run for run in PUBLISHED if run.device == rates.published_on)
    predicted, measured = predicted_rate(run, DEVICES[run.device]), run.tokens_per_second_per_gpu
    table.append(
        (
            "lower end of the range",
            f"speed x {calibration(device):.2f}: {measured:,.0f} tokens/s/GPU published, "
            f"{predicted:,.0f} predicted",
            f"{run.what}, on {run.device}",
        )
    )
    return table
