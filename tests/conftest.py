"""Fixtures that more than one test module needs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported: sums must not depend on how many tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

from megaphi.config import Recipe
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.training.trainer import Trainer
from tests.helpers import write_toy_tokens
from tests.layouts import Launcher, shared_launcher


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a small token file with 512 ids."""
    return write_toy_tokens(tmp_path_factory.mktemp("tokens") / "toy")


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    """Starts trainings by forking a process that has imported everything."""
    return shared_launcher()


@pytest.fixture
def train_here() -> Callable[[list[str]], Recipe]:
    """Train in this process; returns the recipe."""

    def train(options: list[str]) -> Recipe:
        recipe = load_recipe(options)
        with processes() as mesh:
            Trainer(recipe, mesh).run()
        return recipe

    return train
