"""The loss of a model that one process computes alone on a CPU.

FSDP2 has nothing to gather or to sum there, but its hooks cost time at every block and end every
graph that torch.compile makes. Parameters are plain fp32 tensors instead, each cast to the compute
dtype where it is used, as FSDP2 casts them; their gradients come back and add up in fp32. Casts,
blocks and loss are one function, so that the compiler sees them as one graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from megaphi.model.phi import Phi


def cast_and_run(model: Phi, compute_dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function like the model's forward pass, which computes in another dtype.

    Args:
        model: the complete model; its parameters are read in every call.
        compute_dtype: of weights and activations; the parameters keep their own.
    """

    def run(*arguments: object, **options: object) -> Tensor:
        weights = {name: p.to(compute_dtype) for name, p in model.named_parameters()}
        result: Tensor = functional_call(model, weights, arguments, options)
        return result

    return run
