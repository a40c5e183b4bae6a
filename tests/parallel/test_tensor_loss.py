"""Head and loss over a part of the vocabulary, on an axis of one process that has all of it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaphi.parallel.tensor import TensorAxis, linear_cross_entropy


@pytest.fixture
def axis() -> Iterator[TensorAxis]:
    """One process, through the code of several."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield TensorAxis(dist.group.WORLD, 0, 1)
    dist.destroy_process_group()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias, and labels; more rows than one chunk has."""
    torch.manual_seed(0)
    tensors = [torch.randn(size).to(dtype) for size in ((600, 12), (40, 12), (40,))]
    return [tensor.requires_grad_() for tensor in tensors], torch.randint(40, (600,))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_equals_float64(axis: TensorAxis, dtype: torch.dtype, most: float) -> None:
    tensors, labels = inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = linear_cross_entropy(*tensors, labels, axis)
    logits = torch.nn.functional.linear(*exact)
    exact_loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=most)
    loss.backward()
    exact_loss.backward()
    for ours, other in zip(tensors, exact, strict=True):
        assert ours.grad.dtype == dtype
        assert float((ours.grad.double() - other.grad).norm() / other.grad.norm()) < 2 * most


@pytest.mark.parametrize("label", [-1, 40])
def test_a_label_outside_of_the_vocabulary_makes_the_loss_nan(axis: TensorAxis, label: int) -> None:
    tensors, labels = inputs()
    labels[3] = label
    loss = linear_cross_entropy(*tensors, labels, axis)
    assert bool(loss.isnan())
    loss.backward()
    assert tensors[0].grad.isnan().any(dim=1).nonzero().flatten().tolist() == [3]
