"""The same recipe gives the same loss curve however it is spread, dropout and all."""

import json
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, curve, toy_options
from tests.layouts import run_training


@pytest.fixture(scope="module")
def one_process(toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the toy recipe on one process, in micro-batches of two."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = run_training(toy_options(toy_tokens, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def assert_same_curve(first: Path, second: Path) -> None:
    """Losses to 1e-5 and gradient norms to 1e-4, relative, at every step and two evaluations."""
    a, b = curve(first), curve(second)
    assert a.keys() == b.keys()
    last = max(step for step, _ in a)
    assert len(a) == last + 2
    for key in a:
        assert a[key][0] == pytest.approx(b[key][0], rel=1e-5), key
        assert a[key][1:] == pytest.approx(b[key][1:], rel=1e-4), key
    assert a[last, "train"][0] < a[1, "train"][0] - 0.3  # it learned something


@pytest.mark.parametrize("reshard", ["false", "true"])
def test_two_processes_give_the_curve_of_one(
    one_process: Path, toy_tokens: Path, tmp_path: Path, reshard: str
) -> None:
    options = toy_options(toy_tokens, tmp_path / "run", parallel__reshard_after_forward=reshard)
    done = run_training(options, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_curve(one_process, tmp_path / "run")


def test_another_micro_batch_size_gives_the_same_curve(
    one_process: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    done = run_training(toy_options(toy_tokens, tmp_path / "run", train__micro_batch_size=8))
    assert done.returncode == 0, done.stderr
    assert_same_curve(one_process, tmp_path / "run")


def test_a_checkpoint_of_two_processes_resumes_on_one(
    one_process: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """The second half runs on one process from shards that two have written."""
    options = toy_options(toy_tokens, tmp_path / "run", data__planned_samples=160)
    halfway = [o for o in options if "train.steps" not in o]
    schedule = "--schedule.decay_steps=20"
    done = run_training([*halfway, "--train.steps=10", schedule], processes=2)
    assert done.returncode == 0, done.stderr
    done = run_training([*halfway, "--train.steps=20", schedule])
    assert done.returncode == 0, done.stderr
    assert "processes was 2, is 1" in done.stdout
    assert_same_curve(one_process, tmp_path / "run")


def test_a_run_can_start_from_anothers_weights(
    one_process: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """Finetuning: on two processes, from one's checkpoint, with a learning rate of almost 0."""
    options = toy_options(
        toy_tokens,
        tmp_path / "run",
        checkpoint__initialize_from=one_process,
        optimizer__learning_rate=1e-12,
        train__steps=1,
    )
    done = run_training(options, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"new run from the weights of {one_process}/step-00000020" in done.stdout
    last = curve(one_process)[20, "validation"][0]
    assert curve(tmp_path / "run")[1, "validation"][0] == pytest.approx(last, rel=1e-5)
    # another shape is refused in one line
    done = run_training([*options, "--model.num_layers=3"])
    assert done.returncode == 2
    assert "model.num_layers was 2, is 3" in done.stderr


def test_the_curve_is_the_committed_one(one_process: Path) -> None:
    """A change of the mathematics, of the data's order or of a random number would show here."""
    reference = json.loads((REPOSITORY / "tests" / "assets" / "reference_losses.json").read_text())
    committed = {(row["step"], row["kind"]): row["values"] for row in reference["rows"]}
    ours = curve(one_process)
    assert ours.keys() == committed.keys()
    for key, values in committed.items():
        # processors differ in the order of their sums
        assert ours[key] == pytest.approx(values, rel=1e-4), key
