"""FP8 layers through NVIDIA's Transformer Engine, for `precision.fp8_backend=te`.

Not run on a GPU yet: written against the interface of Transformer Engine 2.9 to 2.20
(`transformer_engine/pytorch/module/linear.py`, `quantization.py`, `common/recipe/__init__.py`) and
tested with a stand-in that has the same signatures and computes in PyTorch.

Transformer Engine is imported only when such a layer is made. The parameters stay in our layer,
under our names, so that checkpoints, FSDP2 and the optimizer see no difference; the library's layer
has none of its own and is lent the gathered weight for each call. Biases are added by us.

Differences from the native layers: weight gradients leave the product in bf16, and the scales of
delayed scaling are not in our checkpoints: a resumed run starts with an empty history. With
delayed scaling the library itself takes the maximum over processes as a forward pass ends.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from megaphi.model.linear import Linear
from megaphi.precision.fp8_interface import Fp8


class TransformerEngineFp8(Fp8):
    """What the layers of Transformer Engine share: the recipe and the place in the step.

    Args:
        names: layers of a block to make in FP8, of qkv, out, fc1 and fc2.
        scaling: where scales come from; the library's own defaults for the rest: e4m3 forward and
            e5m2 backward, a history of 1,024 passes for delayed scaling.

    Raises:
        ValueError: Transformer Engine does not import, or is too old.
    """

    def __init__(
        self, names: Sequence[str], scaling: Literal["current", "delayed"] = "current"
    ) -> None:
        super().__init__(names)
        try:
            self.library: Any = importlib.import_module("transformer_engine.pytorch")
            recipes: Any = importlib.import_module("transformer_engine.common.recipe")
        # a build for another CUDA or PyTorch fails with whatever its loader raises
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                f"precision.fp8_backend=te: Transformer Engine does not import: {error}; use "
                "precision.fp8_backend=native"
            ) from error
        if not hasattr(self.library, "autocast"):
            version = importlib.metadata.version("transformer_engine")
            raise ValueError(
                f"precision.fp8_backend=te needs Transformer Engine 2.9 or later, not {version}; "
                "use precision.fp8_backend=native"
            )
        recipe = recipes.DelayedScaling if scaling == "delayed" else recipes.Float8CurrentScaling
        self.recipe = recipe(fp8_format=recipes.Format.HYBRID)
        self.is_first_micro_batch: bool | None = None
        self.inside = False

    def make_fp8(self, in_features: int, out_features: int) -> Linear:
        """A layer of Transformer Engine with our parameters."""
        return TransformerEngineLinear(in_features, out_features, self)

    def forward_pass(self, is_first_micro_batch: bool | None = None) -> AbstractContextManager[Any]:
        """Encloses a forward pass of the model, not its backward pass.

        Args:
            is_first_micro_batch: of its step: True casts the weights anew, False reuses what that
                cast; None (evaluation) casts anew and keeps nothing.
        """
        return self._forward_pass(is_first_micro_batch)

    @contextmanager
    def _forward_pass(self, is_first_micro_batch: bool | None) -> Iterator[None]:
        """One `autocast` around all layers: delayed scaling updates its scales as it ends."""
        assert not self.inside, "a forward pass inside a forward pass"
        self.inside, self.is_first_micro_batch = True, is_first_micro_batch
        try:
            with self.library.autocast(enabled=True, recipe=self.recipe):
                yield
        finally:
            self.inside = False


class TransformerEngineLinear(Linear):
    """y = x W^T + b by Transformer Engine; weight [out, in] and bias are ours."""

    def __init__(self, in_features: int, out_features: int, shared: TransformerEngineFp8) -> None:
        super().__init__(in_features, out_features)
        engine = shared.library.Linear(
            in_features, out_features, bias=False, params_dtype=torch.bfloat16, device="meta"
        )
        # not a submodule: its weight must not be among the model's parameters
        object.__setattr__(self, "engine", engine)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b, [..., out_features]."""
        return self.product(x) + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T, without the bias, [..., out_features]."""
        assert self.shared.inside, "the forward pass must run inside Fp8.forward_pass()"
        engine: Any = self.engine
        engine._parameters["weight"] = self.weight
        result: Tensor = engine(x, is_first_microbatch=self.shared.is_first_micro_batch)
        return result
