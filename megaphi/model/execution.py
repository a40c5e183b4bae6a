"""How a model is computed: what neither its weights nor its formulas depend on."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from megaphi.model.attention_backends import Backend
from megaphi.model.linear import MakeLinear, make_linear
from megaphi.parallel.axes import Axes

Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again instead of keeping it: nothing, GELU, or whole blocks."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the blocks of a model are computed; the default is one process without any saving."""

    make: MakeLinear = make_linear
    """Makes the linear layers of the blocks, in the number format of the run."""
    attention: Backend = "sdpa"
    """What `megaphi.model.attention_backends.choose` decided on."""
    axes: Axes = field(default_factory=Axes)
    """What cuts layers and sequences over processes."""
    recompute: Recompute = "none"


def recomputed(level: Recompute) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a module's method, which the backward pass runs again at this level.

    The module's `recompute` has the level of the run. Random numbers need no care: dropout is a
    function of the position in the run.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *inputs: Any) -> Any:
            if self.recompute != level or not torch.is_grad_enabled():
                return method(self, *inputs)
            bound = functools.partial(method, self)
            return checkpoint(bound, *inputs, use_reentrant=False, preserve_rng_state=False)

        return run

    return decorate
