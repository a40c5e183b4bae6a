"""What a training run has to do for FP8, whichever library multiplies."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaphi.model.linear import Linear

SIZE_MULTIPLE = 16
"""cuBLAS: inner sizes and numbers of columns of FP8 products are multiples of this."""


class Fp8:
    """What a training run has to do for FP8, whichever library multiplies.

    Args:
        names: layers of a block to make in FP8, of qkv, out, fc1 and fc2.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def make(self, name: str, in_features: int, out_features: int) -> Linear:
        """A `MakeLinear`: the layer of this name, in FP8 if it is one of those chosen.

        Raises:
            ValueError: a size that FP8 products do not take.
        """
        if name not in self.names:
            return Linear(in_features, out_features)
        for size in (in_features, out_features):
            if size % SIZE_MULTIPLE != 0:
                raise ValueError(
                    f"layer {name} is {in_features} x {out_features}: in fp8 both sizes must be "
                    f"multiples of {SIZE_MULTIPLE}; leave {name} out of precision.fp8_layers"
                )
        return self.make_fp8(in_features, out_features)

    def make_fp8(self, in_features: int, out_features: int) -> Linear:
        """A layer in FP8."""
        raise NotImplementedError

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Make what the layers keep, once the model is on its device and before it is loaded."""

    def forward_pass(self, is_first_micro_batch: bool | None = None) -> AbstractContextManager[Any]:
        """Encloses a forward pass of the model, not its backward pass.

        Args:
            is_first_micro_batch: of its step; None outside training.
        """
        return nullcontext()

    def weights_changed(self) -> None:
        """To be called when weights change other than by a step: when a checkpoint was loaded."""

    def after_step(self, group: dist.ProcessGroup | None) -> None:
        """To be called after every optimizer step, on all processes.

        Args:
            group: the processes that share the batch; None for a single one.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold alongside weights and moments, equal on all processes."""
        return {}
