"""What the optimizer adds to the update: clipping, and a divisor of the gradients."""

import pytest
import torch

from megaphi.config import Optimizer
from megaphi.optim.adamw import AdamW
from megaphi.parallel.mesh import processes


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_divisor_is_taken_out_of_gradients_and_norm(clip: float) -> None:
    """As a loss scale; the large epsilon makes the update depend on the size of the gradients."""
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4), torch.randn(6, 4)
    weights, norms = [], []
    with processes() as mesh:
        for factor in (1.0, 4096.0):
            parameter = torch.nn.Parameter(start.clone())
            config = Optimizer(epsilon=0.1, gradient_clip=clip)
            optimizer = AdamW([("weight", parameter)], config, mesh)
            parameter.grad = gradient * factor
            norm, _ = optimizer.step(0.1, None if factor == 1.0 else torch.tensor(factor))
            weights.append(parameter.detach())
            norms.append(norm)
    torch.testing.assert_close(norms[1], gradient.norm())
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_clipping_is_pytorchs(clip: float) -> None:
    """Large gradients are scaled down, small ones are not scaled up."""
    torch.manual_seed(1)
    start, gradient = torch.randn(6, 4), torch.randn(6, 4)
    theirs = torch.nn.Parameter(start.double())
    theirs.grad = gradient.double()
    torch.nn.utils.clip_grad_norm_([theirs], clip)
    config = Optimizer(epsilon=0.1, gradient_clip=clip)
    torch.optim.AdamW([theirs], 0.1, (config.beta1, config.beta2), 0.1, config.weight_decay).step()
    with processes() as mesh:
        ours = torch.nn.Parameter(start.clone())
        optimizer = AdamW([("weight", ours)], config, mesh)
        ours.grad = gradient.clone()
        optimizer.step(0.1)
    torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_nonfinite_step_does_not_count() -> None:
    with processes() as mesh:
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = AdamW([("weight", parameter)], Optimizer(), mesh)
        for value, updates in ((1.0, 1), (float("nan"), 1), (float("inf"), 1), (2.0, 2)):
            before = parameter.detach().clone()
            parameter.grad = torch.full((3, 2), value)
            _, counted = optimizer.step(0.1)
            assert int(optimizer.updates) == updates
            assert torch.equal(parameter, before) is not bool(counted)
