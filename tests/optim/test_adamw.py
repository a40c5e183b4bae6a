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
