"""What the tests of faults share."""

import random

import pytest

from tests.faults.save_trials import Saves
from tests.layouts import Launcher


@pytest.fixture(scope="session")
def saves(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """Disturbs saves of a small state."""
    return Saves(launcher, tmp_path_factory.mktemp("saves"))


@pytest.fixture
def generator() -> random.Random:
    """Another sequence every time; its seed is in the output of a test that fails."""
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")
    return random.Random(seed)
