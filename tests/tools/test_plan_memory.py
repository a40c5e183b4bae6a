"""The memory model against what real models keep, and against values worked out by hand."""

import dataclasses
import importlib.util
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.dispatch import interpreting
from kernels.ops import DropoutSeed
from megaphi.config import Model, Optimizer, Parallel
from megaphi.model.execution import Execution
from megaphi.model.phi import Phi
from megaphi.model.rotary import rotary_tables
from megaphi.optim.adamw import AdamW, own_part
from megaphi.parallel.mesh import processes
from megaphi.training.parallelize import parallelize, send_gradients, sharded_modules
from tests.kernels.interpreter import assert_passes_in_the_interpreter
from tools.planning.layout import Job, Layout, PipelineSchedule, Recompute, problems, search
from tools.planning.memory import (
    GIB,
    block_saved_bytes,
    loss_kept_bytes,
    memory_plan,
    micro_batches_in_flight,
    stage_memory,
    stage_saved_bytes,
)

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

SMALL = Model(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, max_sequence_length=64)
WIDE_HEADS = Model(
    num_layers=3,
    hidden_size=96,
    num_heads=3,
    intermediate_size=160,
    vocab_size=100,
    max_sequence_length=40,
    residual_dropout=0.1,
)
PHI1 = Job(
    model=Model(residual_dropout=0.1, attention_dropout=0.1),
    sequence_length=2048,
    global_batch_size=1024,
)


def saved_bytes(config: Model, batch: int, time: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a forward pass keeps, beside weights and tables."""
    model = Phi(config).to(dtype)
    tables = rotary_tables(
        config.max_sequence_length, config.rotary_dim, config.rotary_base, torch.device("cpu")
    )
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *tables)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, config.vocab_size, (batch, time))
    dropout = DropoutSeed(seed=1, step=1, first_token=0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens.roll(1, dims=1), dropout=dropout)
    assert loss.requires_grad
    return sum(kept.values())


def predicted(job: Job, batch: int) -> float:
    """The same from the formulas."""
    layout = Layout(micro_batch_size=batch)
    return stage_saved_bytes(job, layout, 0) + loss_kept_bytes(job, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "batch", "time"),
    [
        (SMALL, 2, 32),
        (dataclasses.replace(SMALL, residual_dropout=0.2), 3, 64),
        (WIDE_HEADS, 1, 40),
        (WIDE_HEADS, 5, 17),
    ],
)
def test_plain_operations_keep_what_the_formula_says(
    config: Model, batch: int, time: int, dtype: torch.dtype
) -> None:
    job = Job(
        model=config,
        sequence_length=time,
        global_batch_size=batch,
        compute_bytes=dtype.itemsize,
        kernels="torch",
    )
    expected = predicted(job, batch)
    if dtype == torch.bfloat16:
        # PyTorch's LayerNorm keeps its two statistics in fp32 on a GPU, in bf16 on a CPU
        expected -= batch * time * (config.num_layers + 1) * 2 * 2
    assert saved_bytes(config, batch, time, dtype) == expected


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "batch", "time"), [(SMALL, 2, 16), (WIDE_HEADS, 1, 8)])
def test_triton_operations_keep_what_the_formula_says(
    config: Model, batch: int, time: int, dtype: torch.dtype
) -> None:
    job = Job(
        model=config,
        sequence_length=time,
        global_batch_size=batch,
        compute_bytes=dtype.itemsize,
        kernels="triton",
    )
    assert saved_bytes(config, batch, time, dtype) == predicted(job, batch)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_operations_in_a_child() -> None:
    name = "test_triton_operations_keep_what_the_formula_says"
    assert_passes_in_the_interpreter([f"{__file__}::{name}"], at_least=4)


def test_state_of_a_real_run() -> None:
    """Weights, master weights, gradients and moments of FSDP2's own objects, in bf16."""
    job = Job(model=SMALL, sequence_length=32, global_batch_size=4)
    layout = Layout(micro_batch_size=2)
    assert layout.micro_batches(job) == 2
    plan = memory_plan(job, layout)
    with processes() as mesh:
        with torch.device("meta"):
            model = Phi(SMALL)
        parallelize(model, mesh, Parallel(), torch.bfloat16)
        model.to_empty(device=mesh.device)
        with torch.no_grad():
            for parameter in model.parameters():
                own_part(parameter).fill_(0.02)
        optimizer = AdamW(model.named_parameters(), Optimizer(), mesh)
        assert plan.master == sum(own_part(p).nbytes for p in optimizer.parameters.values())
        moments = [*optimizer.first_moments.values(), *optimizer.second_moments.values()]
        assert plan.moments == sum(own_part(moment).nbytes for moment in moments)
        # a micro-batch that is not the last of its step
        send_gradients(model, False, Parallel())
        tokens = torch.randint(0, SMALL.vocab_size, (2, 32))
        model(tokens, tokens).backward()
        weights = gradients = 0
        for module in sharded_modules(model):
            group = module._get_fsdp_state()._fsdp_param_group
            for held in [] if group is None else group.fsdp_params:
                whole = held._unsharded_param
                gradient = held.unsharded_accumulated_grad
                gradient = whole.grad if gradient is None else gradient
                weights += whole.nbytes
                gradients += gradient.nbytes
        assert (plan.weights, plan.gradients) == (weights, gradients)


class PeakOfStorages(TorchDispatchMode):
    """Follows the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_peak_of_a_real_step_is_within_the_plan() -> None:
    """Estimated temporaries cover the step, and by no more than half of the whole."""
    config = dataclasses.replace(SMALL, residual_dropout=0.1, vocab_size=64)
    # as many rows as a chunk of the loss has on a CPU
    job = Job(model=config, sequence_length=64, global_batch_size=8, kernels="torch")
    plan = memory_plan(job, Layout())
    model = Phi(config).to(torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (8, 64))
    dropout = DropoutSeed(seed=1, step=1, first_token=0)
    model(tokens, tokens, dropout=dropout).backward()
    with PeakOfStorages() as storages:
        model(tokens, tokens, dropout=dropout).backward()
    # views of the weights count among the operations' results
    weights = sum(parameter.nbytes for parameter in model.parameters())
    planned = plan.activations + plan.temporaries + plan.loss + 2 * weights
    assert planned / 2 < storages.peak <= planned


def test_phi1_on_eight_gpus_by_hand() -> None:
    parameters = 1_418_270_720
    plan = memory_plan(PHI1, Layout(data=8))
    assert plan.weights == 2 * parameters
    assert plan.weights / GIB == pytest.approx(2.64, abs=0.005)
    # every first dimension of phi-1 is a multiple of 8
    assert plan.master * 8 == 4 * parameters
    assert plan.moments * 8 == 8 * parameters
    # 16 micro-batches of 8 add up in fp32 before anything is sent
    assert plan.gradients == 4 * parameters
    assert plan.gradients / GIB == pytest.approx(5.28, abs=0.005)
    # a block and a token: 14 vectors of 2,048 in bf16, 32 log-sums, a mean and a 1/std
    block = 14 * 2048 * 2 + 32 * 4 + 8
    token = 24 * block + (2048 * 2 + 8 + 8)
    assert plan.activations == 8 * 2048 * token
    assert block_saved_bytes(PHI1, Recompute.NONE) == block
    assert block_saved_bytes(PHI1, Recompute.SELECTIVE) == block - 4 * 2048 * 2
    assert block_saved_bytes(PHI1, Recompute.FULL) == 2 * 2048 * 2
    # the head: gradients kept in bf16, then two fp32 copies and the result while they are scaled
    weight = 51200 * 2048
    assert plan.loss == 2 * (16384 * 2048 + weight + 51200) + 10 * weight


def test_plain_operations_also_keep_masks() -> None:
    plain = dataclasses.replace(PHI1, kernels="torch")
    assert block_saved_bytes(plain) - block_saved_bytes(PHI1) == 2 * 2048 * 4
    dry = dataclasses.replace(plain, model=Model())
    assert block_saved_bytes(dry) == block_saved_bytes(PHI1)


def test_uneven_shards_are_rounded_up() -> None:
    model = Model(num_layers=1, hidden_size=8, num_heads=2, vocab_size=10, max_sequence_length=16)
    job = Job(model=model, sequence_length=16, global_batch_size=3)
    # first dimensions 10, 8, 8 | 24, 24, 8, 8, 32, 32, 8, 8, 8, 8 | 10, 10 over 3: largest parts
    rows = {10: 4, 8: 3, 24: 8, 32: 11}
    elements = rows[10] * 8 + 2 * rows[8] + rows[24] * 9 + rows[8] * 9 + rows[32] * 9
    elements += rows[8] * (32 + 1) + 2 * rows[8] + rows[10] * 9
    assert memory_plan(job, Layout(data=3, micro_batch_size=1)).master == 4 * elements


def test_tensor_parallel_cuts_everything_but_the_vectors() -> None:
    plan = stage_memory(PHI1, Layout(data=4, tensor=2), 0)
    whole = 2 * 25 * 2048 + 24 * 2 * 2048  # LayerNorms, and the biases of out and fc2
    assert plan.weights == 2 * ((1_418_270_720 - whole) // 2 + whole)
    one = stage_memory(PHI1, Layout(data=8), 0)
    tokens = 8 * 2048
    assert plan.activations == (one.activations - 8 * tokens) // 2 + 8 * tokens


@pytest.mark.parametrize(
    ("schedule", "chunks", "expected"),
    [
        (PipelineSchedule.ONE_F_ONE_B, 1, [4, 3, 2, 1]),
        (PipelineSchedule.ZBV, 2, [4, 4, 4, 4]),
        (PipelineSchedule.INTERLEAVED_ZERO_BUBBLE, 2, [11 / 2] * 4),
        # Megatron's interleaved warm-up: 2 (stages - stage - 1) + (chunks - 1) stages, and one more
        (PipelineSchedule.INTERLEAVED, 2, [11 / 2, 9 / 2, 7 / 2, 5 / 2]),
    ],
)
def test_micro_batches_in_flight(
    schedule: PipelineSchedule, chunks: int, expected: list[float]
) -> None:
    layout = Layout(pipeline=4, data=2, schedule=schedule, chunks=chunks)
    assert [micro_batches_in_flight(PHI1, layout, stage) for stage in range(4)] == expected


def test_the_fullest_stage_is_reported() -> None:
    layout = Layout(pipeline=4, data=2)
    first, last = stage_memory(PHI1, layout, 0), stage_memory(PHI1, layout, 3)
    assert memory_plan(PHI1, layout) == first
    assert first.total > last.total
    assert first.loss == 0 < last.loss
    recomputed = dataclasses.replace(layout, micro_batch_size=1, recompute=Recompute.FULL)
    assert memory_plan(PHI1, recomputed).stage == 3


def test_zbv_has_both_ends_on_the_first_stage() -> None:
    layout = Layout(pipeline=4, data=2, schedule=PipelineSchedule.ZBV, chunks=2)
    first, last = stage_memory(PHI1, layout, 0), stage_memory(PHI1, layout, 3)
    ends = 2 * 51200 * 2048 + 51200 + 2 * 2048  # embedding, head, its bias, the first LayerNorm
    assert first.weights - last.weights == 2 * ends
    assert first.loss > 0 == last.loss
    assert memory_plan(PHI1, layout).stage == 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_keeps_what_the_formula_says(recompute: str) -> None:
    """By the storages that live after the forward pass: checkpointing hides them from hooks."""
    live = {}
    for kind in ("none", recompute):
        model = Phi(SMALL, Execution(recompute=kind)).to(torch.bfloat16)
        tokens = torch.randint(0, SMALL.vocab_size, (4, 64))
        with PeakOfStorages() as storages:
            loss = model(tokens, tokens)
            assert loss.requires_grad
            live[kind] = sum(storages.sizes.values())
    job = Job(model=SMALL, sequence_length=64, global_batch_size=4, kernels="torch")
    layout = Layout(micro_batch_size=4)
    other = dataclasses.replace(layout, recompute=Recompute(recompute))
    expected = stage_saved_bytes(job, layout, 0) - stage_saved_bytes(job, other, 0)
    assert live["none"] - live[recompute] == pytest.approx(expected, rel=0.05)


def test_what_saves_memory_saves_it() -> None:
    base = Layout(data=8)
    total = memory_plan(PHI1, base).total
    for change in (
        {"micro_batch_size": 4},
        {"recompute": Recompute.SELECTIVE},
        {"recompute": Recompute.FULL},
        {"reshard_after_forward": True},
        {"data": 4, "tensor": 2},
        {"data": 4, "context": 2},
    ):
        layout = dataclasses.replace(base, **change)
        assert not problems(PHI1, layout)
        assert memory_plan(PHI1, layout).total < total, change
    assert memory_plan(dataclasses.replace(PHI1, kernels="torch"), base).total > total


def test_the_update_is_the_peak_of_small_batches_with_plain_operations() -> None:
    job = dataclasses.replace(PHI1, kernels="torch")
    plan = memory_plan(job, Layout(micro_batch_size=1, recompute=Recompute.FULL))
    # weights, gradients, two moments and two temporaries, all fp32
    assert plan.total == plan.update > 24 * 1_418_270_720


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tensor": 64}, "num_heads"),
        ({"tensor": 3}, "num_heads"),
        ({"pipeline": 5}, "num_layers"),
        ({"data": 3}, "global_batch_size"),
        ({"context": 3}, "sequence_length"),
        ({"data": 128, "pipeline": 2}, "do not fill pipeline=2"),
        ({"chunks": 2}, "1f1b has 1"),
        (
            {"pipeline": 8, "data": 32, "schedule": PipelineSchedule.INTERLEAVED, "chunks": 3},
            "multiples of pipeline=8",
        ),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, int], word: str) -> None:
    assert any(word in text for text in problems(PHI1, Layout(**change)))


def test_search_finds_only_what_divides() -> None:
    found = list(search(PHI1, 24))
    assert found
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.pipeline * layout.data * layout.context * layout.tensor == 24
        assert 24 % layout.pipeline == 0
        assert 32 % layout.tensor == 0
        assert 1024 % (layout.data * layout.micro_batch_size) == 0
        assert 2048 % (2 * layout.context) == 0 or layout.context == 1
    # 3 divides neither the heads, nor the samples, nor the sequence: it must be in the pipeline
    assert {layout.pipeline % 3 for layout in found} == {0}
    assert {layout.tensor for layout in search(PHI1, 16, gpus_per_node=4)} == {1, 2, 4}
