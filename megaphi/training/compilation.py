"""Whether torch.compile is used, and for what: decided once, from the recipe and the machine."""

from dataclasses import dataclass
from typing import Literal

import torch

from megaphi.config import Recipe
from megaphi.metrics.flops import flops_per_token
from megaphi.model.phi import Phi

FLOPS_TO_COMPILE_A_LAYER = 1e12
"""Work of a run, for each layer of its model, from which compiling takes less time than it saves.

Compiling 4 layers takes 13 to 24 s of one core, and a third of that from the compiler's cache; it
saves a third of the time of a small model's step. Counted in operations, so that a resumed run
decides as it did before, on any machine."""


@dataclass(frozen=True)
class CompileChoice:
    """What is compiled."""

    scope: Literal["nothing", "blocks", "model"]
    """`model`: casts, blocks and loss as one graph, where one process computes alone on a CPU and
    nothing is dropped."""
    reason: str
    """For people."""


def choose_compile(recipe: Recipe, alone_on_cpu: bool) -> CompileChoice:
    """Decide what is compiled.

    Args:
        recipe: the run; its `compute.compile` asks for it, refuses it, or leaves it open.
        alone_on_cpu: one process computes the complete model on a CPU.

    Raises:
        ValueError: it was asked for, and there is no working C++ compiler.
    """
    asked = recipe.compute.compile
    if asked is False:
        return CompileChoice("nothing", "compute.compile=false")
    # the random numbers of all dropouts in one graph take minutes to compile
    drops = max(recipe.model.residual_dropout, recipe.model.attention_dropout) > 0
    if not alone_on_cpu or drops:
        if asked == "auto":
            return CompileChoice("nothing", "auto compiles on a CPU, one process, without dropout")
        return CompileChoice("blocks", "compute.compile=true")
    if asked == "auto" and not pays(recipe):
        return CompileChoice("nothing", "the run is too short for it to save time")
    problem = compiler_problem()
    if problem is None:
        why = "compute.compile=true" if asked is True else "the run is long enough to save time"
        return CompileChoice("model", why)
    if asked is True:
        raise ValueError(
            f"compute.compile=true: torch.compile does not work here: {problem}; install a C++ "
            "compiler (g++) and Python's headers, or set compute.compile=auto"
        )
    return CompileChoice("nothing", f"torch.compile does not work here: {problem}")


def pays(recipe: Recipe) -> bool:
    """Whether the steps of a run, from the first on, save more time than compiling costs."""
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.data.sequence_length
    flops = tokens * flops_per_token(recipe.model, recipe.data.sequence_length, causal=True)
    return flops >= recipe.model.num_layers * FLOPS_TO_COMPILE_A_LAYER


def compiler_problem() -> str | None:
    """Why torch.compile cannot make code for this CPU; None where it does.

    Asked by compiling something: it needs a C++ compiler, its OpenMP, and Python's headers, each of
    which may be missing or broken.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(8))
    except Exception as error:  # whatever compiler and linker come up with
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def compile_blocks(model: Phi, backend: str = "inductor") -> None:
    """Compile the forward pass of each block; FSDP2's hooks around it stay as they are.

    All blocks share one graph: only the number of a block differs, and the compiler is told to take
    it as a variable. Otherwise it would compile eight blocks, and silently run the others as they
    are written.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
