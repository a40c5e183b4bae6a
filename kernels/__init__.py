"""The operations of the training step; `reference` holds their definition in plain PyTorch.

Callers import from this package, never from a file of it: which implementation runs is decided
here, in one place.
"""

from kernels.reference import (
    DropoutSeed,
    adamw_step_,
    bias_dropout_add_layer_norm,
    bias_gelu,
    dropout_masks,
    layer_norm,
    linear_cross_entropy,
    rotary,
    sum_of_squares,
)

__all__ = [
    "DropoutSeed",
    "adamw_step_",
    "bias_dropout_add_layer_norm",
    "bias_gelu",
    "dropout_masks",
    "layer_norm",
    "linear_cross_entropy",
    "rotary",
    "sum_of_squares",
]
