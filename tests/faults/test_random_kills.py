"""Trainings that are killed at random moments of their saves end as if nothing had been."""

import random
from pathlib import Path

import pytest

from tests.faults.save_trials import KINDS, Kind
from tests.faults.training_trials import Trainings
from tests.helpers import short_and_slow
from tests.layouts import Launcher


@pytest.fixture(scope="module")
def trainings(
    launcher: Launcher, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    """Runs and disturbs one small training."""
    return Trainings(launcher, toy_tokens, tmp_path_factory.mktemp("trainings"))


@pytest.mark.parametrize(
    "kind",
    short_and_slow([Kind(2, True)], [kind for kind in KINDS if kind != Kind(2, True)]),
    ids=str,
)
def test_killed_three_times(trainings: Trainings, kind: Kind, generator: random.Random) -> None:
    """Final weights and curve are those of the uninterrupted run, to the last bit."""
    outcome = trainings.disturbed(kind, ["kill one", "kill all", "kill one"], generator)
    assert outcome.violations == []
    assert outcome.figures["kill one"] + outcome.figures["kill all"] >= 2
    assert outcome.figures["starts"] == 4


@pytest.mark.slow
def test_everything_at_once(trainings: Trainings, generator: random.Random) -> None:
    """Killed, then damaged where it stands, then without space, then asked to stop."""
    events = ["kill one", "bit flip", "disk full", "swapped", "terminate", "zeroed"]
    outcome = trainings.disturbed(Kind(2, True), events, generator)
    assert outcome.violations == []
    # chance decides which of them come before the run is over
    assert sum(outcome.figures[event] for event in events) >= 1
