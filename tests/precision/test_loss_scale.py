"""The dynamic loss scale of fp16."""

import torch

from megaphi.config import Precision
from megaphi.precision.loss_scale import LossScale

CPU = torch.device("cpu")


def follow(scale: LossScale, finite_steps: str) -> list[float]:
    """The factor after each step; `.` is a finite step, `x` an overflow."""
    values = []
    for step in finite_steps:
        scale.update(torch.tensor(step == "."))
        values.append(scale.value.item())
    return values


def test_overflows_halve_and_quiet_intervals_double() -> None:
    scale = LossScale(Precision(initial_loss_scale=64.0, loss_scale_interval=3), CPU, enabled=True)
    # an overflow starts the count of quiet steps anew
    assert follow(scale, "x..x....") == [32.0, 32.0, 32.0, 16.0, 16.0, 16.0, 32.0, 32.0]
    assert follow(scale, "xxxxxxx") == [16.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0]


def test_growth_ends_before_fp32_overflows() -> None:
    scale = LossScale(Precision(loss_scale_interval=1), CPU, enabled=True)
    values = follow(scale, "." * 200)
    assert values[-1] == values[-2]
    assert torch.isfinite(torch.tensor(values[-1]) ** 2)


def test_other_formats_have_the_factor_1_for_ever() -> None:
    scale = LossScale(Precision(), CPU, enabled=False)
    assert follow(scale, "x.x") == [1.0, 1.0, 1.0]


def test_the_state_goes_on_where_it_stopped() -> None:
    precision = Precision(initial_loss_scale=64.0, loss_scale_interval=4)
    straight = LossScale(precision, CPU, enabled=True)
    first = LossScale(precision, CPU, enabled=True)
    expected = follow(straight, ".x...x.....")
    begun = follow(first, ".x...")
    second = LossScale(precision, CPU, enabled=True)
    second.load_state(first.state())
    assert begun + follow(second, "x.....") == expected
