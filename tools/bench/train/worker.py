"""One configuration of `megaphi bench train`, measured in a process of its own.

Called as `python -m tools.bench.train.worker REQUEST.json`: the request holds the options of a
recipe, how many steps to warm up, to time and to profile, and where the result goes. What runs is
the trainer itself: its model, loader, optimizer and step, without reports and checkpoints.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaphi.config import Recipe
from megaphi.data.loader import Loader
from megaphi.metrics.logger import RunLogger
from megaphi.optim.adamw import own_part
from megaphi.parallel.mesh import Mesh, processes
from megaphi.precision.policy import facts_of, resolve
from megaphi.recipe_file import load_recipe
from megaphi.training.trainer import Trainer
from tools.bench.train.measure import measure


class BenchTrainer(Trainer):
    """A trainer whose loop is a measurement."""

    def __init__(self, recipe: Recipe, mesh: Mesh, request: dict[str, Any]) -> None:
        self.request = request
        self.result: dict[str, Any] = {}
        self.messages: list[str] = []
        super().__init__(recipe, mesh)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights on the device: on the host it takes longer than the measurement.

        They depend on the seed and the kind of device alone, so configurations start alike.
        """
        model, device = self.recipe.model, self.mesh.device
        generator = torch.Generator(device).manual_seed(self.recipe.train.seed)
        for name, parameter in self.optimizer.parameters.items():
            part = own_part(parameter)
            if part.dim() == 1:
                part.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            residual = name.endswith(("out.weight", "fc2.weight"))
            scale = (2 * model.num_layers) ** -0.5 if residual else 1.0
            part.normal_(0.0, model.initializer_range * scale, generator=generator)

    def say(self, message: str) -> None:
        """Keep for the result what the trainer tells about its choices."""
        if not message.startswith("recipe:"):
            self.messages.append(message)

    def loop(self, loader: Loader, logger: RunLogger | None) -> None:
        """Measure instead of training to the end."""

        def step() -> Callable[[], float]:
            metrics = self.train_step(loader)
            return lambda: metrics.numbers.values()[0]

        self.result = measure(
            step, self.request, self.mesh.device, self.state.reporter.timer.seconds
        )


def measure_ours(request: dict[str, Any]) -> dict[str, Any]:
    """Steps of the trainer."""
    recipe = load_recipe(request["options"])
    with processes() as mesh:
        trainer = BenchTrainer(recipe, mesh, request)
        trainer.run()
        formats = resolve(recipe.precision, facts_of(mesh.device)).reason
        return {**trainer.result, "formats": formats, "messages": trainer.messages}


def main(path: Path) -> None:
    """Answer a request."""
    request = json.loads(path.read_bytes())
    if request["peer"] is None:
        result = measure_ours(request)
    else:
        from tools.bench.train.transformers_peer import measure_transformers

        result = measure_transformers(request)
    if torch.cuda.is_available():
        result["device"] = torch.cuda.get_device_name()
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
