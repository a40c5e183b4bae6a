"""The formats of FP8 layers, and scales from the largest values of the steps before.

Suffixes: l layers in FP8, t their tensors (input, gradient), h steps of the history.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.reference_fp8 import scale_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INPUT, GRADIENT = 0, 1
"""The tensors of a layer with delayed scaling."""
FORMATS = (E4M3, E5M2)
"""The format of each."""


class DelayedScaling:
    """Largest values of the steps before, and the scales of this step.

    All micro-batches of a step have the same scales, on every process, however the step is cut up.
    A history of one step is Transformer Engine's `most_recent`, a longer one its `max`. Until a
    first step is recorded there is no scale to take: `ready` is False and scaling is current.
    """

    def __init__(self, num_layers: int, history_length: int, device: torch.device) -> None:
        shape = (num_layers, len(FORMATS))
        self.history_lth = torch.zeros(*shape, history_length, device=device)
        """Per layer and tensor the largest value of each step, newest first, 0 where none."""
        self.largest_lt = torch.zeros(shape, device=device)
        """Largest value so far in this step, on this process."""
        self.scales: list[list[tuple[Tensor, Tensor]]] = []
        self.stale = True

    @property
    def ready(self) -> bool:
        """Whether there are scales; waits for the device only after the history was loaded."""
        if self.stale:
            self.stale = False
            self.scales = []
            if bool(self.history_lth.any()):
                self.set_scales()
        return bool(self.scales)

    def start_from_history(self) -> None:
        """Forget the present step and its scales: the history was loaded."""
        self.largest_lt.zero_()
        self.stale = True

    def record(self, layer: int, which: int, partial_amax_p: Tensor) -> None:
        """Take in the largest values of a tensor of this step."""
        largest = self.largest_lt[layer, which]
        torch.maximum(largest, partial_amax_p.amax(), out=largest)

    def after_step(self, group: dist.ProcessGroup | None) -> None:
        """Enter this step into the history, and derive the scales of the next."""
        # a NaN or infinity of a step that the optimizer skipped says nothing of the next
        self.largest_lt.nan_to_num_(nan=0.0, posinf=0.0)
        if group is not None:
            dist.all_reduce(self.largest_lt, op=dist.ReduceOp.MAX, group=group)
        kept = self.history_lth[..., :-1]
        self.history_lth.copy_(torch.cat((self.largest_lt[..., None], kept), dim=-1))
        self.largest_lt.zero_()
        self.stale = False
        self.set_scales()

    def set_scales(self) -> None:
        """Scale and inverse of every tensor, each a tensor of its own, from the history."""
        amax_lt = self.history_lth.amax(dim=-1)
        self.scales = []
        for layer in amax_lt:
            scales = [scale_of(amax, dtype) for amax, dtype in zip(layer, FORMATS, strict=True)]
            self.scales.append(scales)
