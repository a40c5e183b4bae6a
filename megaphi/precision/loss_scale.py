"""Dynamic loss scale for fp16 (Micikevicius et al., arXiv 1710.03740, section 3.2).

fp16 has no numbers below 6e-8: small gradients would vanish. The mean loss of a micro-batch is
multiplied by a power of two before the backward pass, and the optimizer divides the fp32 gradients
by it. A gradient that
overflows skips the step and halves the factor; `loss_scale_interval` steps without an overflow
double it. All of it happens on the device: the host learns the factor with the step's metrics.
"""

import torch
from torch import Tensor

from megaphi.config import Precision

_LARGEST = 2.0**60
"""fp32 gradients, and the sum of their squares, must not overflow because of the factor."""


class LossScale:
    """The factor on the loss, 1 and never changed where the number format does not need one."""

    def __init__(self, precision: Precision, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), precision.initial_loss_scale if enabled else 1.0, device=device)
        """fp32 scalar on the device."""
        self._good_steps = torch.zeros((), device=device)
        self._interval = precision.loss_scale_interval

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Learn whether the step's gradients were finite (bool scalar on the device)."""
        if not self.enabled:
            return
        good_steps = self._good_steps + 1
        grows = good_steps >= self._interval
        grown = torch.where(grows, (2 * self.value).clamp(max=_LARGEST), self.value)
        halved = (self.value / 2).clamp(min=1.0)
        self.value.copy_(torch.where(finite, grown, halved))
        self._good_steps.copy_(torch.where(finite & ~grows, good_steps, 0.0))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value.item(), "good_steps": self._good_steps.item()}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on where a checkpoint stopped; without a need for the factor nothing happens."""
        if self.enabled:
            self.value.fill_(state["value"])
            self._good_steps.fill_(state["good_steps"])
