"""AdamW over sharded parameters, with clipping and the skipping of non-finite steps on the device.

The host never looks at a gradient: norm, clip factor and the decision to skip are tensors.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels import ops
from megaphi.config import Optimizer
from megaphi.parallel.mesh import Mesh


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; for the forward pass there is `parallel.tensor.local`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_repeated(parameter: Tensor) -> bool:
    """Whether every process of the tensor axis holds the same elements."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tensor" in names and parameter.placements[names.index("tensor")].is_replicate()


class AdamW:
    """AdamW (arXiv 1711.05101) with decoupled weight decay of matrices only.

    State is kept by parameter name, in fp32, sharded as the parameters are: `first_moments`,
    `second_moments`, and `updates`, the device-side count of steps that were not skipped.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: Optimizer, mesh: Mesh
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.parameters = dict(named_parameters)
        self.first_moments = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.second_moments = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.updates = torch.zeros((), dtype=torch.float32, device=mesh.device)

    @torch.no_grad()
    def step(self, learning_rate: float, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip the gradients, update the parameters in place, and drop the gradients.

        A non-finite gradient norm changes nothing: neither parameters, moments nor the count.

        Args:
            learning_rate: of this step.
            divisor: fp32 scalar on the device by which the gradients are too large.

        Returns:
            The gradient norm before clipping (fp32 scalar) and whether the step counted (bool
            scalar), both on the device and equal on every process.
        """
        norm = self.gradient_norm()
        if divisor is not None:
            norm = norm / divisor
        finite = torch.isfinite(norm)
        clip = self.config.gradient_clip
        scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
        if divisor is not None:
            scale = scale / divisor
        self.updates += finite
        # the count is at least 1 where it is used, also while every step so far was skipped
        count = self.updates.clamp(min=1.0)
        for decays in (True, False):
            names = [n for n, p in self.parameters.items() if (p.dim() > 1) is decays]
            ops.adamw_step_(
                [own_part(self.parameters[name]) for name in names],
                [own_part(self.gradient(name)) for name in names],
                [own_part(self.first_moments[name]) for name in names],
                [own_part(self.second_moments[name]) for name in names],
                count,
                finite,
                scale,
                learning_rate=learning_rate,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                epsilon=self.config.epsilon,
                weight_decay=self.config.weight_decay if decays else 0.0,
            )
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, finite

    def gradient(self, name: str) -> Tensor:
        """The gradient of one parameter."""
        gradient = self.parameters[name].grad
        assert gradient is not None, f"{name} has no gradient"
        return gradient

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients over all processes, fp32 scalar on the device."""
        whole = [name for name, p in self.parameters.items() if _is_repeated(p)]
        cut = [name for name in self.parameters if name not in whole]
        squares = ops.sum_of_squares([own_part(self.gradient(name)) for name in cut])
        if whole:
            # every process of the tensor axis has these: each counts its share
            repeated = ops.sum_of_squares([own_part(self.gradient(name)) for name in whole])
            squares = squares + repeated / self.mesh.tensor_size
        return self.mesh.sum_(squares / self.mesh.num_groups).sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments under the names they have in a checkpoint."""
        return {
            **{f"optimizer.first_moment.{n}": t for n, t in self.first_moments.items()},
            **{f"optimizer.second_moment.{n}": t for n, t in self.second_moments.items()},
        }
