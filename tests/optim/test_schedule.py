"""The learning rate against PyTorch's own schedulers and hand-computed points."""

import pytest
import torch

from megaphi.config import Recipe
from megaphi.optim.schedule import learning_rate
from megaphi.recipe_file import load_recipe


def recipe(*options: str, steps: int = 36000) -> Recipe:
    return load_recipe(["--train.run_dir=r", f"--train.steps={steps}", "--data.train=t", *options])


def test_phi1_base_points() -> None:
    phi = recipe()
    assert learning_rate(phi, 1) == pytest.approx(1e-3 / 750)
    assert learning_rate(phi, 750) == 1e-3
    assert learning_rate(phi, 24000) == pytest.approx(1e-3 * 12000 / 35250)
    assert learning_rate(phi, 36000) == 0.0


def test_linear_equals_pytorch_schedulers() -> None:
    steps, warmup = 60, 10
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-9, 1.0, total_iters=warmup)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps - warmup)
    chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    ours = recipe("--schedule.warmup_steps=10", "--schedule.minimum_fraction=0.1", steps=steps)
    for step in range(1, steps + 1):
        optimizer.step()
        chain.step()
        assert learning_rate(ours, step) == pytest.approx(chain.get_last_lr()[0], rel=1e-6)


def test_cosine_equals_pytorch_scheduler() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=2e-4)
    ours = recipe(
        "--schedule.warmup_steps=0",
        "--schedule.shape=cosine",
        "--schedule.minimum_fraction=0.2",
        "--schedule.decay_steps=50",
        steps=80,
    )
    for step in range(1, 51):
        optimizer.step()
        cosine.step()
        assert learning_rate(ours, step) == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
    assert learning_rate(ours, 80) == pytest.approx(2e-4)


def test_constant_keeps_the_peak() -> None:
    ours = recipe("--schedule.shape=constant", "--schedule.warmup_steps=4", steps=20)
    assert [learning_rate(ours, step) for step in (2, 4, 20)] == [5e-4, 1e-3, 1e-3]
