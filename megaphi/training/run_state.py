"""What a run continues from: its state, how it is saved, resumed and rewound."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megaphi.checkpoint.manager import CheckpointManager
from megaphi.checkpoint.resume import (
    changes,
    check_same_model,
    check_same_order,
    check_state,
    check_token_file_dates,
    environment,
    recipe_changes,
)
from megaphi.config import Recipe
from megaphi.durable import write_durably
from megaphi.formats.manifest import CheckpointError
from megaphi.formats.tokenizer_files import copy_tokenizer
from megaphi.metrics.logger import RunLogger
from megaphi.optim.adamw import AdamW, own_part
from megaphi.parallel.mesh import Mesh
from megaphi.resilience.spikes import Rewinds
from megaphi.training.engine import Engine
from megaphi.training.reporter import Reporter
from megaphi.training.training_data import TrainingData


class RunState:
    """The state of a run on one process, from its weights to its position in the data.

    Args:
        recipe: the run.
        mesh: its processes.
        data: its token files.
        checkpoints: where the state is saved.
        engine: the model.
        optimizer: its optimizer.
        say: prints a line for people.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        data: TrainingData,
        checkpoints: CheckpointManager,
        engine: Engine,
        optimizer: AdamW,
        say: Callable[[str], None],
    ) -> None:
        self.step = 0
        """Steps done."""
        self.reporter = Reporter(recipe, mesh, engine.dtype)
        self.resumed_from: Path | None = None
        """The checkpoint from which this process started."""
        self.run_dir = Path(recipe.train.run_dir)
        self.rewinds = Rewinds(self.run_dir)
        self._recipe = recipe
        self._mesh = mesh
        self._data = data
        self._checkpoints = checkpoints
        self._engine = engine
        self._optimizer = optimizer
        self._say = say

    def tensors(self) -> dict[str, Tensor]:
        """Model and optimizer tensors under their checkpoint names."""
        optimizer, engine = self._optimizer, self._engine
        weights = {f"model.{name}": p.detach() for name, p in optimizer.parameters.items()}
        return {**weights, **optimizer.state_tensors(), **engine.precision_tensors()}

    def save(self) -> None:
        """Publish a checkpoint of the present step, at once or in the background.

        Raises:
            CheckpointError: it holds NaN or infinity, or see `CheckpointManager.save`.
        """
        engine, tensors = self._engine, self.tensors()
        self._refuse_nonfinite(tensors)
        state = {
            "step": self.step,
            "consumed_samples": self.step * self._recipe.train.global_batch_size,
            "optimizer_updates": int(self._optimizer.updates.item()),
            **self.reporter.state(),
            "rewinds": self.rewinds.state(),
            "loss_scale": engine.loss_scale.state(),
            "precision_tensors": sorted(engine.precision_tensors()),
            "data_order": self._data.order,
            "token_file_dates": self._data.dates,
            "environment": environment(self._mesh, engine.rounding),
        }
        self._checkpoints.save(self.step, tensors, state)

    def _refuse_nonfinite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise a `CheckpointError` on all processes if any of them holds NaN or infinity."""
        finite = {name: own_part(tensor).isfinite().all() for name, tensor in tensors.items()}
        broken = [name for name, flag in finite.items() if not flag]
        if self._mesh.any(bool(broken)):
            where = f": {broken[0]}" if broken else " on another process"
            raise CheckpointError(
                f"step {self.step}: weights or moments are not finite{where}; nothing was saved, "
                "and the checkpoint before stays the newest"
            )

    def resume(self) -> bool:
        """Load the newest verified checkpoint; False where a new run has to start."""
        mesh = self._mesh
        self.rewinds = mesh.on_main(lambda: Rewinds.read(self.run_dir))
        mesh.on_main(self.rewinds.drop_void_checkpoints)
        found = self._checkpoints.find()
        if found is not None:
            self.restore(found)
        return found is not None

    def restore(self, found: Path) -> None:
        """Continue from a verified checkpoint, and report what is not as it was."""
        recipe, mesh, engine = self._recipe, self._mesh, self._engine
        check_same_model(recipe.model, found)
        state = self._checkpoints.load(found, self._tensors_to_load)
        check_state(state, recipe, found)
        check_same_order(state["data_order"], self._data.order, found)
        drift = mesh.on_main(
            lambda: check_token_file_dates(recipe, self._data.infos, state["token_file_dates"])
        )
        self.rewinds = self.rewinds.joined(state["rewinds"], found)
        mesh.on_main(self.rewinds.write)
        self.step = state["step"]
        self.resumed_from = found
        self.reporter.load_state(state)
        self._optimizer.updates.fill_(state["optimizer_updates"])
        engine.loaded(state["loss_scale"])
        self._say(f"resuming from {found}")
        drift = [*changes(state["environment"], environment(mesh, engine.rounding)), *drift]
        if drift:
            self._say(f"not bitwise the same as before: {', '.join(drift)}")
        different = recipe_changes(recipe, found)
        if different:
            self._say(f"going on with other settings: {', '.join(different)}")

    def rewind(self) -> None:
        """Answer a loss spike: return to a checkpoint, and leave out the data around the spike.

        The decision is on the disk before anything is deleted: a run that is killed in between
        continues here when it is resumed.
        """
        spike, mesh = self.reporter.spike, self._mesh
        assert spike is not None
        self._checkpoints.wait()
        self.rewinds = self.rewinds.after(spike, self._recipe.train)
        self._say(
            f"the loss spiked at steps {spike.first_step} to {spike.last_step} ({spike.loss:.3f}, "
            f"before {spike.mean:.3f}); going back"
        )
        found: Path = mesh.on_main(self.rewinds.find_checkpoint)
        mesh.on_main(self.rewinds.write)
        mesh.on_main(self.rewinds.drop_void_checkpoints)
        self.reporter = Reporter(self._recipe, mesh, self._engine.dtype)
        self.restore(found)
        self.resumed_from = None  # the run was not started again

    def write_settings(self) -> None:
        """Put the recipe and the tokenizer into the run directory; by main alone."""
        write_durably(self.run_dir / "config.yaml", self._recipe.to_yaml())
        tokenizer = Path(f"{self._data.prefixes[0]}.tokenizer")
        if tokenizer.is_dir():
            copy_tokenizer(tokenizer, self.run_dir / "tokenizer")

    def open_logger(self) -> RunLogger:
        """The metrics of this run, cut to the present step, with what led here."""
        logger = RunLogger(self._recipe, self.run_dir, self.step)
        for record in self.rewinds.state():
            logger.event(min(record["void_after"], self.step), "rewind", **record)
        if self.resumed_from is not None:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            logger.event(self.step, "resume", checkpoint=self.resumed_from.name, time=now)
        return logger

    def _tensors_to_load(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Those of `tensors` that a checkpoint has; another number format keeps others."""
        missing = self._engine.precision_tensors().keys() - state.get("precision_tensors", [])
        return {name: t for name, t in self.tensors().items() if name not in missing}
