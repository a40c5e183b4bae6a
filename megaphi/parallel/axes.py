"""The axes that cut the model's computation, in the form in which the model asks for them."""

from dataclasses import dataclass, field

from megaphi.parallel.context import ContextAxis
from megaphi.parallel.mesh import Mesh
from megaphi.parallel.tensor import TensorAxis


@dataclass(frozen=True)
class Axes:
    """Tensor and context axis; neither cuts anything unless it is given."""

    tensor: TensorAxis = field(default_factory=TensorAxis)
    context: ContextAxis = field(default_factory=ContextAxis)


def axes_of(mesh: Mesh, overlaps: bool = False) -> Axes:
    """The axes of a run's processes; `overlaps` as in `TensorAxis`."""
    tensor, context = (
        (mesh.group(axis), mesh.axis_rank(axis), mesh.axis_size(axis))
        for axis in ("tensor", "context")
    )
    return Axes(TensorAxis(*tensor, overlaps), ContextAxis(*context))
