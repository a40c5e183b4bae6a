"""What a run prints before its first step: the recipe, and what was decided for it."""

from collections.abc import Iterator

from megaphi.config import Recipe
from megaphi.device import device_name
from megaphi.metrics.logger import format_count
from megaphi.model.phi import num_parameters
from megaphi.parallel.mesh import AXES, Mesh
from megaphi.training.engine import Engine


def describe_run(recipe: Recipe, mesh: Mesh, engine: Engine) -> Iterator[str]:
    """Lines for people."""
    yield "recipe:\n" + "".join(f"  {line}\n" for line in recipe.to_yaml().splitlines())
    yield (
        f"{format_count(num_parameters(recipe.model))} parameters, "
        f"{mesh.size} process(es) on {device_name(mesh.device)}, "
        f"{str(engine.dtype).removeprefix('torch.')}, "
        f"{engine.num_micro_batches} micro-batch(es) a step, "
        f"{format_count(engine.tokens_per_step)} tokens a step"
    )
    yield f"precision: {engine.policy.reason}"
    yield f"attention: {engine.attention.reason}"
    yield f"compiled: {engine.compilation.scope}; {engine.compilation.reason}"
    yield "layout: " + ", ".join(f"{axis} {mesh.axis_size(axis)}" for axis in AXES)
    if mesh.tensor_size > 1:
        yield f"overlap: {engine.overlap.reason}"
    if engine.pipeline is not None:
        sizes = [len(layers) for layers in engine.layers_of_stages]
        yield (
            f"pipeline: {recipe.parallel.pipeline_schedule}, blocks of the stages {sizes}, "
            f"{engine.pipeline.bubble():.1%} of a process's time idle"
        )
