"""The one place, and the one order, in which the model is wrapped for several processes."""

import itertools
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from megaphi.config import Parallel
from megaphi.model.linear import ADDS_UP
from megaphi.model.phi import Phi
from megaphi.parallel.mesh import Mesh


def parallelize(model: Phi, mesh: Mesh, parallel: Parallel, compute_dtype: torch.dtype) -> None:
    """Cut a model over the tensor axis and shard it over the others with FSDP2, in place.

    Parameters become fp32 DTensors; each process holds its share of every one. Weights are
    gathered in `compute_dtype`, gradients are summed (not averaged: the loss already carries the
    global batch size) in fp32. Without `reshard_after_forward` the gathered weights stay until the
    backward pass has used them (ZeRO-2 traffic).
    """
    if mesh.tensor_size > 1:
        cut_layers(model, mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # the model decides by itself what stays in fp32 (the rotary tables)
        cast_forward_inputs=False,
    )
    units = [unit for unit in (model.embedding, *model.blocks, model.head) if unit is not None]
    for module in (*units, model):
        fully_shard(
            module,
            mesh=mesh.shards,
            mp_policy=policy,
            reshard_after_forward=parallel.reshard_after_forward,
        )
    for unit, following in itertools.pairwise(units):
        # asked for before this unit's products are, however late the host is; the backward pass
        # does so by itself
        assert isinstance(unit, FSDPModule)
        assert isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
    adds_up = parallel.pipeline == 1 or parallel.pipeline_schedule in ("1f1b", "interleaved")
    for module in sharded_modules(model):
        # gloo has neither mean nor scaled sum; a plain sum needs no other reduction
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        assert isinstance(module, nn.Module)
        module.register_forward_pre_hook(partial(_keep_gradients_in_fp32, adds_up))


def cut_layers(model: Phi, mesh: Mesh) -> None:
    """Make every parameter of a model on "meta" a DTensor on the tensor axis, in place.

    `qkv` and `fc1` are cut by outputs, `out` and `fc2` by inputs, embedding and head by vocabulary;
    the rest is whole on every process.
    """
    axis = mesh.grid["tensor"]
    for path, parameter in list(model.named_parameters()):
        owner, _, name = path.rpartition(".")
        cut = distribute_tensor(parameter, axis, [tensor_placement(path)])
        model.get_submodule(owner).register_parameter(name, nn.Parameter(cut))


def tensor_placement(name: str) -> Placement:
    """How the parameter of a name is laid out on the tensor axis."""
    layer, _, kind = name.rpartition(".")
    if layer.endswith(("qkv", "fc1", "tokens")) or layer == "head":
        return Shard(0)
    if layer.endswith(("out", "fc2")) and kind == "weight":
        return Shard(1)
    return Replicate()


def _keep_gradients_in_fp32(adds_up: bool, module: nn.Module, _: object) -> None:
    """Let the gathered weights, which are 16 bits wide, have fp32 gradients.

    Runs after FSDP2's own hook, which makes the gathered parameters, and has an effect once. FSDP2
    would widen each micro-batch's gradient by itself, but only after it was rounded to 16 bits.
    """
    for parameter in module.parameters():
        if parameter.dtype != torch.float32 and parameter.grad_dtype != torch.float32:
            parameter.grad_dtype = torch.float32
            setattr(parameter, ADDS_UP, adds_up)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that gather and free their weights as one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def send_gradients(model: nn.Module, send: bool, parallel: Parallel) -> None:
    """Whether the next backward pass sums gradients over processes, or keeps them for later.

    Those that keep them also keep the gathered weights, which change only after the last one,
    unless the recipe asks to free them (`parallel.reshard_after_forward`).
    """
    assert isinstance(model, FSDPModule), "the model has not been parallelized"
    model.set_requires_gradient_sync(send)
    model.set_reshard_after_backward(send or parallel.reshard_after_forward)


def release_gathered_weights(model: nn.Module) -> None:
    """Free weights that a forward pass without a backward pass has left gathered."""
    for module in sharded_modules(model):
        module.reshard()
