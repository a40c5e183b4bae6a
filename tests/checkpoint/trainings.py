"""Trainings with a hand in them, for tests.layouts to start in several processes."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megaphi.checkpoint import manager
from megaphi.formats.manifest import CheckpointError
from megaphi.parallel.mesh import processes
from megaphi.precision.loss_scale import LossScale
from megaphi.recipe_file import load_recipe
from megaphi.training import engine
from megaphi.training.trainer import Trainer
from tests.helpers import before_tensor_writes


def with_everything(argv: list[str]) -> int:
    """Train with all the state there can be; a run that has resumed first saves as it is.

    FP8 with delayed scaling needs a GPU, and fp16 would round differently in each layout. So fp32
    gets the loss scale of the one, powers of two, and a tensor like the other's.
    """
    recipe = load_recipe(argv)

    def precision_tensors(self: engine.Engine) -> dict[str, torch.Tensor]:
        if not hasattr(self, "history"):
            new = recipe.checkpoint.resume == "auto"
            self.history = torch.arange(48.0).sin() if new else torch.zeros(48)
        return {"fp8.amax_history": self.history.view(16, 3)}

    engine.Engine.precision_tensors = precision_tensors
    engine.LossScale = lambda precision, device, enabled: LossScale(precision, device, enabled=True)
    with processes(recipe.parallel) as mesh:
        trainer = Trainer(recipe, mesh)
        if trainer.state.step > 0:
            trainer.save()
        trainer.run()
    return 0


def with_another_view_on_rank_1(argv: list[str]) -> int:
    """Train where rank 1 does not see the checkpoints that there are."""
    recipe = load_recipe(argv)
    with processes(recipe.parallel) as mesh:
        if mesh.rank == 1:
            manager.find_checkpoints = lambda _: []
        Trainer(recipe, mesh).run()
    return 0


def with_unreadable_files_on_rank_1(argv: list[str]) -> int:
    """Train where rank 1 finds a file missing that rank 0 has."""

    def verify_files(directory: Path, *_: object) -> None:
        raise CheckpointError(f"{directory}: a file is missing")

    recipe = load_recipe(argv)
    with processes(recipe.parallel) as mesh:
        if mesh.rank == 1:
            manager.verify_files = verify_files
        Trainer(recipe, mesh).run()
    return 0


def _disturbed(argv: list[str], rank: int, disturb: Callable[[Trainer], None]) -> int:
    """Train; the save of step 10 meets something on one process, before its first byte."""
    recipe = load_recipe(argv)
    with processes(recipe.parallel) as mesh:
        trainer = Trainer(recipe, mesh)

        def before_write(path: str) -> None:
            if ".step-00000010" in path and mesh.rank == rank:
                disturb(trainer)

        with before_tensor_writes(before_write):
            trainer.run()
    return 0


def _wait_for_step(trainer: Trainer, step: int) -> None:
    """Wait until training, which goes on meanwhile, has done a step."""
    while trainer.state.step < step:
        time.sleep(0.001)


def killed_in_a_save(argv: list[str]) -> int:
    """Rank 1 is killed while it writes and trains."""

    def kill(trainer: Trainer) -> None:
        _wait_for_step(trainer, 12)
        os.kill(os.getpid(), signal.SIGKILL)

    return _disturbed(argv, 1, kill)


def stopped_in_a_save(argv: list[str]) -> int:
    """Rank 0 is asked to stop, and goes on writing until the others wait for it."""

    def stop(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        _wait_for_step(trainer, 12)
        time.sleep(0.2)

    return _disturbed(argv, 0, stop)


def full_disk_in_a_save(argv: list[str]) -> int:
    """Rank 1 finds no space."""

    def fail(_: Trainer) -> None:
        raise OSError(28, "No space left on device")

    return _disturbed(argv, 1, fail)


def broken_thread_in_a_save(argv: list[str]) -> int:
    """Rank 1's thread ends by an error that it does not share, where the others wait for it."""

    def fail(*_: object) -> None:
        raise KeyError("a fault of the program")

    def plant(_: Trainer) -> None:
        manager.check_unlisted = fail

    return _disturbed(argv, 1, plant)
