"""What runs beside what: the order in which one process starts and awaits collectives.

A group that sends nothing stands in for the other processes, and a dispatch mode writes down every
collective, every wait for one, and every matrix product.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ops import DropoutSeed
from megaphi.config import Model, Parallel
from megaphi.model import column_pair as overlap
from megaphi.model.column_pair import choose_overlap, column_pair
from megaphi.model.execution import Execution
from megaphi.model.linear import ADDS_UP, LinearWithFp32Gradient
from megaphi.model.phi import Phi
from megaphi.parallel.axes import axes_of
from megaphi.parallel.mesh import AXES, Mesh
from megaphi.parallel.tensor import TensorAxis, local
from megaphi.training.parallelize import cut_layers, parallelize

CONFIG = Model(num_layers=3, hidden_size=32, num_heads=4, vocab_size=64, residual_dropout=0.1)
ROWS = 16
DROPOUT = DropoutSeed(seed=1, step=1, first_token=0)


def mesh_of(data: int, tensor: int) -> Mesh:
    """Processes of which only the first exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data * tensor)
    grid = init_device_mesh("cpu", (1, data, 1, tensor), mesh_dim_names=AXES)
    world = dist.group.WORLD
    assert world is not None
    shards = grid["data", "context"]._flatten("shards")
    return Mesh(device=torch.device("cpu"), grid=grid, shards=shards, control=world)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No group is left behind."""
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass
class Window:
    """The life of one collective."""

    kind: str
    products: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the matrix products that were started while it ran."""


class Recorder(TorchDispatchMode):
    """Writes down collectives and products in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[Window] = []
        self.events: list[str] = []
        self._open: dict[int, Window] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function.name().partition("::")
        name = name.partition(".")[0]
        if namespace == "aten" and name in ("mm", "addmm", "addmm_"):
            self.events.append("product")
            for window in self._open.values():
                window.products.append(tuple(result.shape))
        elif namespace == "_c10d_functional" and name == "wait_tensor":
            del self._open[args[0].untyped_storage().data_ptr()]
        elif namespace == "_c10d_functional":
            window = Window("gather" if name.startswith("all_gather") else "scatter")
            assert result.untyped_storage().data_ptr() not in self._open
            self._open[result.untyped_storage().data_ptr()] = window
            self.windows.append(window)
        elif namespace == "c10d":
            self.events.append("gather" if "gather" in name else "scatter")
        return result

    def finish(self) -> None:
        """Every collective was awaited."""
        assert not self._open


def cut_model(mesh: Mesh, overlaps: bool, **options: Any) -> Phi:
    """A model over the tensor axis, with values."""
    with torch.device("meta"):
        model = Phi(CONFIG, Execution(axes=axes_of(mesh, overlaps), **options))
    cut_layers(model, mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().normal_(std=0.02)
    return model


def run_block(model: Phi, tensor: int, recorder: Recorder) -> None:
    """Forward and backward of one block."""
    part, residual = (torch.randn(ROWS // tensor, 32, requires_grad=True) for _ in range(2))
    batch = model.describe(torch.Size((2, ROWS // 2)), part.device, DROPOUT)
    with recorder:
        normed, stream = model.blocks[1](part, residual, batch)
        (normed.sum() + stream.sum()).backward()
    recorder.finish()


@pytest.mark.parametrize("tensor", [2, 4])
def test_collectives_of_a_blocks_begin_run_beside_its_products(tensor: int) -> None:
    recorder = Recorder()
    run_block(cut_model(mesh_of(1, tensor), True), tensor, recorder)
    kinds = [window.kind for window in recorder.windows]
    assert kinds == ["gather", "scatter", "gather", "gather", "scatter"]
    begin, end, end_backward, again, begin_backward = recorder.windows
    qkv, fc1 = 96 // tensor, 128 // tensor
    assert begin.products == [(ROWS // tensor, qkv), (ROWS // tensor, fc1)]
    assert again.products == [(ROWS, 32), (ROWS, 32)]
    assert begin_backward.products == [(qkv, 32), (fc1, 32)]
    # the sum of the branches is all that the block's end has to wait for, and the reverse
    assert end.products == end_backward.products == []


def test_without_overlap_nothing_runs_beside_a_collective() -> None:
    recorder = Recorder()
    run_block(cut_model(mesh_of(1, 2), False), 2, recorder)
    assert [window.kind for window in recorder.windows] == [
        "gather",
        "scatter",
        "gather",
        "scatter",
    ]
    assert all(window.products == [] for window in recorder.windows)


def test_a_block_that_is_computed_again_gathers_no_third_time() -> None:
    recorder = Recorder()
    run_block(cut_model(mesh_of(1, 2), True, recompute="full"), 2, recorder)
    gathers = [window for window in recorder.windows if window.kind == "gather"]
    # forward, its repetition, and the gradient of the block's end
    assert len(gathers) == 3
    assert sum(window.products != [] for window in gathers) == 2


def kept_by_a_block(model: Phi, part: Tensor) -> dict[int, int]:
    """Bytes of what one block keeps for its backward pass, by address; parameters left out."""
    batch = model.describe(torch.Size((2, ROWS // 2)), part.device, None)
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        model.blocks[1](part, torch.randn_like(part).requires_grad_(), batch)
    weights = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (local(saved).untyped_storage() for saved in kept)
    }
    return {place: size for place, size in storages.items() if place not in weights}


def test_the_gathered_rows_are_not_kept() -> None:
    """A block keeps its part of the rows in their place."""
    mesh, totals, part = mesh_of(1, 4), [], torch.randn(ROWS // 4, 32, requires_grad=True)
    for overlaps in (False, True):
        model = cut_model(mesh, overlaps)
        kept = kept_by_a_block(model, part)
        assert (part.data_ptr() in kept) is overlaps
        totals.append(sum(kept.values()))
    assert totals[0] - totals[1] == (ROWS - ROWS // 4) * 32 * part.element_size()


@pytest.mark.parametrize("keep_rows", [True, False])
@pytest.mark.parametrize("in_gemm", [True, False])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, keep_rows: bool, in_gemm: bool
) -> None:
    """On an axis of one process, against float64; twice, so that gradients add up."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(overlap, "gradient_in_gemm", lambda x, weight: in_gemm)
    layers = nn.Linear(12, 8), nn.Linear(12, 20)
    axis = TensorAxis(dist.group.WORLD, 0, 1, overlaps=True)
    x = torch.randn(5, 12, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    exact = [nn.Linear(12, 8).double(), nn.Linear(12, 20).double()]
    for ours, other in zip(layers, exact, strict=True):
        other.load_state_dict(ours.state_dict())
        setattr(ours.weight, ADDS_UP, True)
    for _ in range(2):
        grads = torch.randn(5, 8), torch.randn(5, 20)
        torch.autograd.backward(column_pair(x, *layers, axis, keep_rows=keep_rows), grads)
        outputs = exact[0](exact_x), nn.functional.linear(exact_x, exact[1].weight)
        torch.autograd.backward(outputs, [grad.double() for grad in grads])
    assert layers[1].bias.grad is None
    pairs = [(x, exact_x), (layers[0].bias, exact[0].bias)]
    pairs += [(a.weight, b.weight) for a, b in zip(layers, exact, strict=True)]
    for ours, other in pairs:  # type: ignore[assignment]
        torch.testing.assert_close(ours.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_fp32_gradients_of_weights_that_are_cut() -> None:
    """They leave the GEMM in fp32 as DTensors, and the next micro-batch adds in place."""
    mesh = mesh_of(1, 2)
    part = torch.randn(8, 12).bfloat16()
    weight = nn.Parameter(DTensor.from_local(part, mesh.grid["tensor"], [Shard(0)]))
    weight.grad_dtype = torch.float32
    setattr(weight, ADDS_UP, True)
    total, addresses = torch.zeros(8, 12, dtype=torch.float64), set()
    for _ in range(3):
        x, grad = torch.randn(5, 12).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16()
        LinearWithFp32Gradient.apply(x, weight, None).backward(grad)
        total += grad.double().t() @ x.detach().double()
        assert isinstance(weight.grad, DTensor)
        assert (weight.grad.dtype, weight.grad.placements) == (torch.float32, (Shard(0),))
        addresses.add(weight.grad.to_local().data_ptr())
        torch.testing.assert_close(x.grad, grad @ part)
    assert len(addresses) == 1
    assert float((weight.grad.to_local().double() - total).norm() / total.norm()) < 1e-6


def test_weights_are_asked_for_a_block_ahead_and_gradients_leave_at_once() -> None:
    """FSDP2, whose streams a CPU does not have: what counts is the order of the requests."""
    mesh = mesh_of(2, 1)
    with torch.device("meta"):
        model = Phi(CONFIG, Execution(axes=axes_of(mesh)))
    parallelize(model, mesh, Parallel(), torch.float32)
    model.to_empty(device="cpu")
    recorder = Recorder()
    tokens = torch.randint(64, (2, 8))
    with recorder:
        loss = model(tokens, tokens)
        recorder.events.append("backward")
        loss.backward()
    split = recorder.events.index("backward")
    forward, backward = recorder.events[:split], recorder.events[split + 1 :]
    # embedding, three blocks of four products, head: all of a block's see the next one's weights
    gathers_until = list(itertools.accumulate(kind == "gather" for kind in forward))
    asked = [n for n, kind in zip(gathers_until, forward, strict=True) if kind == "product"]
    assert asked[:12] == [3] * 4 + [4] * 4 + [5] * 4
    assert set(asked[12:]) == {5}
    runs = [kind for kind, _ in itertools.groupby(backward) if kind != "gather"]
    # the head's gradients leave before the last block's products, and so on down
    assert runs == ["scatter", "product"] * 3 + ["scatter"]


def test_choice() -> None:
    assert choose_overlap(Parallel(tensor=2), ()).enabled
    assert choose_overlap(Parallel(tensor=2), ("out", "fc2")).enabled
    assert choose_overlap(Parallel(tensor=2, pipeline=2), ()).enabled
    zero_bubble = Parallel(tensor=2, pipeline=2, pipeline_schedule="zbv")
    for parallel, fp8, word in (
        (Parallel(), (), "no tensor parallelism"),
        (Parallel(tensor=2), ("qkv", "out", "fc1"), "qkv and fc1"),
        (zero_bubble, (), "zbv"),
    ):
        off = choose_overlap(parallel, fp8)
        assert not off.enabled
        assert word in off.reason
