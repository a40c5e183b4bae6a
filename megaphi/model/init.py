"""Initial weights as a pure function of (seed, parameter name).

Each parameter has a generator of its own, is drawn at full size on the CPU and only then cut into
shards: the same weights on every device, at every layout, whatever the order of the modules.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megaphi.config import Model


def initial_value(name: str, shape: torch.Size, config: Model, seed: int) -> Tensor:
    """The full fp32 initial value of one parameter, on the CPU.

    Matrices are normal with `initializer_range`; `out` and `fc2`, which write into the residual
    stream, are scaled by 1 / sqrt(2 num_layers) as in GPT-2. Biases are 0, LayerNorm scales 1.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    writes_residual = name.endswith(("out.weight", "fc2.weight"))
    scale = 1 / math.sqrt(2 * config.num_layers) if writes_residual else 1.0
    return torch.empty(shape).normal_(0.0, config.initializer_range * scale, generator=generator)


@torch.no_grad()
def initialize(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: Model, seed: int
) -> None:
    """Fill every parameter, sharded or not, with its initial value."""
    for name, parameter in named_parameters:
        assign(parameter, initial_value(name, parameter.shape, config, seed))


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter; of a DTensor each process copies its own shard."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every process holds the full value, nothing is sent
        local = distribute_tensor(
            full.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
        parameter.to_local().copy_(local.to_local())
    else:
        parameter.copy_(full)
