"""The operations of the training step, as the model calls them.

Each has the name, the signature and the result of its plain definition in `kernels.reference`,
`kernels.reference_fp8` or `kernels.reference_vocabulary`. Which implementation runs is decided call
by call by `kernels.dispatch.use_triton`; Triton is imported only where it runs. AdamW has a faster
implementation for CPUs as well.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from kernels import adamw_cpu, reference, reference_fp8, reference_vocabulary
from kernels.dispatch import use_triton
from kernels.reference import DropoutSeed, dropout_masks

__all__ = [
    "DropoutSeed",
    "adamw_step_",
    "bias_dropout_add",
    "bias_dropout_add_layer_norm",
    "bias_gelu",
    "dropout_masks",
    "fp8_cast",
    "fp8_cast_transpose",
    "fp8_scale",
    "layer_norm",
    "linear_cross_entropy",
    "rotary_packed",
    "sum_of_squares",
    "vocabulary_gradient_",
    "vocabulary_statistics",
]

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _triton_version(file: str, name: str) -> Callable[..., Any]:
    """The function `name` of `kernels/<file>.py`."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"kernels.{file}"), name)
    return function


def _operation(
    plain: Callable[P, R], file: str, on_cpu: Callable[P, R] | None = None
) -> Callable[P, R]:
    """`plain`, or where Triton is to run the function of the same name in `kernels/<file>.py`.

    Without Triton `on_cpu`, if it is given, takes the place of `plain` on a CPU.
    """

    @functools.wraps(plain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        tensor = first[0] if isinstance(first, list) and first else first
        if isinstance(tensor, Tensor) and use_triton(tensor.device):
            result: R = _triton_version(file, plain.__name__)(*args, **kwargs)
            return result
        if on_cpu is not None and isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            return on_cpu(*args, **kwargs)
        return plain(*args, **kwargs)

    return run


layer_norm = _operation(reference.layer_norm, "layer_norm")
bias_dropout_add_layer_norm = _operation(reference.bias_dropout_add_layer_norm, "block_end")
bias_dropout_add = _operation(reference.bias_dropout_add, "dropout_add")
rotary_packed = _operation(reference.rotary_packed, "rotary")
bias_gelu = _operation(reference.bias_gelu, "bias_gelu")
linear_cross_entropy = _operation(reference.linear_cross_entropy, "cross_entropy")
vocabulary_statistics = _operation(
    reference_vocabulary.vocabulary_statistics, "vocabulary_parallel"
)
vocabulary_gradient_ = _operation(reference_vocabulary.vocabulary_gradient_, "vocabulary_parallel")
adamw_step_ = _operation(reference.adamw_step_, "adamw", on_cpu=adamw_cpu.adamw_step_)
sum_of_squares = _operation(reference.sum_of_squares, "adamw")
fp8_scale = _operation(reference_fp8.fp8_scale, "fp8_cast")
fp8_cast = _operation(reference_fp8.fp8_cast, "fp8_cast")
fp8_cast_transpose = _operation(reference_fp8.fp8_cast_transpose, "fp8_cast")
