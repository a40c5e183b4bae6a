"""Weights that are not finite are never published, whatever asked for the save."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megaphi.checkpoint.manager import find_checkpoints
from megaphi.errors import run_main
from megaphi.formats.manifest import CheckpointError
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.train import main
from megaphi.training.trainer import Trainer
from tests.helpers import toy_options


def test_a_run_without_a_finite_step_publishes_nothing(
    toy_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    options = toy_options(
        toy_tokens, run_dir, train__steps=3, schedule__warmup_steps=1, model__initializer_range=1e20
    )
    assert run_main(main, options) == 1
    assert "finite" in capsys.readouterr().err
    assert find_checkpoints(run_dir) == []
    assert not (run_dir / "latest").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["model.", "optimizer."])
def test_a_good_checkpoint_is_not_replaced(
    toy_tokens: Path, tmp_path: Path, value: float, what: str
) -> None:
    run_dir = tmp_path / "run"
    recipe = load_recipe(toy_options(toy_tokens, run_dir, train__steps=5))
    with processes(recipe.parallel) as mesh:
        Trainer(recipe, mesh).run()
        before = find_checkpoints(run_dir)
        assert len(before) == 1
        longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=5))
        trainer = Trainer(longer, mesh)
        try:
            tensors = trainer.state.tensors()
            name = next(
                name for name, t in tensors.items() if name.startswith(what) and t.numel() > 1
            )
            with torch.no_grad():
                tensors[name].view(-1)[0] = value
            trainer.state.step = 6
            with pytest.raises(CheckpointError, match=name):
                trainer.state.save()
        finally:
            trainer.checkpoints.close()
            trainer.watchdog.close()
    assert find_checkpoints(run_dir) == before
