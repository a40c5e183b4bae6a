"""Asked to stop at any moment, a run saves, exits with 75 and goes on as if nothing had been."""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megaphi import train
from megaphi.config import Recipe
from megaphi.errors import Preempted, RunError
from megaphi.formats.manifest import find_checkpoints, verify_checkpoint
from megaphi.metrics.logger import RunLogger
from megaphi.resilience.signals import StopRequest
from tests.faults.test_resume import final_tensors
from tests.helpers import curve, metrics, toy_options
from tests.layouts import Launcher

STEPS = 60
POINTS = (
    "construct", "data", "forward", "backward", "optimizer", "report", "evaluate", "save",
)  # fmt: skip
SIGNALS = (
    ["SIGTERM"], ["SIGUSR1"], ["SIGTERM"] * 2, ["SIGUSR1"] * 2, ["SIGTERM", "SIGUSR1"],
    ["SIGUSR1", "SIGTERM"], ["SIGTERM"] * 3, ["SIGUSR1"] * 3,
)  # fmt: skip


def options_of(tokens: Path, run_dir: Path) -> list[str]:
    """Saves and evaluations all along the way."""
    return toy_options(
        tokens, run_dir, train__steps=STEPS, checkpoint__interval=6, train__evaluation_interval=4,
        train__evaluation_batches=2, train__replica_check_interval=5,
    )  # fmt: skip


def test_signals_at_random_moments(launcher: Launcher, toy_tokens: Path, tmp_path: Path) -> None:
    """One run, stopped again and again: by either signal, to one process or all, once or more.

    Which meets which is left to chance; each is met, and one process alone where all must agree.
    """
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    log = tmp_path / "straight.log"
    assert launcher.train(options_of(toy_tokens, straight), 2, log) == [0, 0], log.read_text()

    seed = random.SystemRandom().randrange(1000)
    print(f"seed {seed}")
    generator = random.Random(seed)
    points, signals = (generator.sample(values, len(POINTS)) for values in (POINTS, SIGNALS))
    others = itertools.cycle(generator.sample([[0], [1], [0, 1]], 3))
    step = 0
    for number, (point, names) in enumerate(zip(points, signals, strict=True)):
        alone = point in ("construct", "evaluate")
        plan = {
            "point": point,
            # three steps before an evaluation, which would also find a request
            "step": 0 if point == "construct" else step + -step % 4 + 1,
            "ranks": generator.choice([[0], [1]]) if alone else next(others),
            "signals": names,
        }
        run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
        log = tmp_path / f"{number}.log"
        entry = "tests.faults.faulty_trainings:signalled"
        statuses = launcher.train(options_of(toy_tokens, run_dir), 2, log, entry)
        assert statuses == [75, 75], (plan, log.read_text())
        assert "stopped on request" in log.read_text()
        if point == "construct":
            assert f"before step {step + 1}, nothing is lost" in log.read_text()
            continue
        before, newest = step, find_checkpoints(run_dir)[0]
        verify_checkpoint(newest)
        step = int(newest.name.removeprefix("step-"))
        assert before < step < STEPS, plan
        if point not in ("evaluate", "save"):  # in the numbers of that step, or of the next
            asked = before + -before % 4 + 1
            assert asked <= step <= asked + (2 if point == "report" else 1), plan
        assert step == max(row["step"] for row in metrics(run_dir)), plan
    log = tmp_path / "rest.log"
    assert launcher.train(options_of(toy_tokens, run_dir), 2, log) == [0, 0], log.read_text()
    assert curve(run_dir) == curve(straight)
    assert final_tensors(run_dir) == final_tensors(straight)
    rows = [(row["step"], "loss" in row) for row in metrics(run_dir) if "event" not in row]
    assert len(rows) == len(set(rows)) == STEPS + STEPS // 4


def test_the_evaluation_that_a_signal_ended_is_done_after_all(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """Also where it is the last thing that the run does."""
    run_dir = tmp_path / "run"
    plan = {"point": "evaluate", "step": STEPS, "ranks": [1], "signals": ["SIGTERM"]}
    run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
    entry = "tests.faults.faulty_trainings:signalled"
    log = tmp_path / "log"
    statuses = launcher.train(options_of(toy_tokens, run_dir), 2, log, entry)
    assert statuses == [75, 75], log.read_text()
    assert (STEPS, "validation") not in curve(run_dir)
    assert launcher.train(options_of(toy_tokens, run_dir), 2, log) == [0, 0], log.read_text()
    assert (STEPS, "validation") in curve(run_dir)
    assert launcher.train(options_of(toy_tokens, run_dir), 2, log) == [0, 0], log.read_text()
    assert f"nothing to do: step {STEPS} of {STEPS} is done" in log.read_text()


def test_a_signal_before_training_is_remembered() -> None:
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopRequest()
        stop.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="step 1"):
            stop.check()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("during", ["imports", "joining"])
def test_a_signal_before_the_trainer_is_made(
    during: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listened to before what takes seconds is imported, looked at after, and handed on."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    handed_on: list[StopRequest] = []

    class Asked(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            assert "megaphi.training.trainer" not in sys.modules
            sys.modules["megaphi.training.trainer"] = Heavy()  # type: ignore[assignment]
            if during == "imports":
                os.kill(os.getpid(), signal.SIGUSR1)

    class Heavy:
        """In place of the modules that import torch."""

        @contextlib.contextmanager
        def processes(self, _: object) -> Iterator[None]:
            assert during == "joining", "the run has begun"
            os.kill(os.getpid(), signal.SIGTERM)
            yield

        def Trainer(self, _: object, __: object, stop: StopRequest) -> "Heavy":  # noqa: N802
            handed_on.append(stop)
            return self

        def run(self) -> None:
            handed_on[0].check()

    monkeypatch.setattr(train, "StopRequest", Asked)
    monkeypatch.setattr(train, "outlive_readers", lambda: None)
    monkeypatch.setitem(sys.modules, "megaphi.parallel.mesh", Heavy())
    monkeypatch.delitem(sys.modules, "megaphi.training.trainer")
    try:
        with pytest.raises(Preempted, match="step 1"):
            train.main(["--train.steps=1", f"--train.run_dir={tmp_path}", "--data.train=tokens"])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert len(handed_on) == (during == "joining")


def test_a_reader_that_goes_away_does_not_end_the_run(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """As in `megaphi train … 2>&1 | head -1`: silent from then on, and metrics are complete."""
    run_dir = tmp_path / "run"
    options = toy_options(toy_tokens, run_dir, logging__interval=1)
    entry = "tests.faults.faulty_trainings:unread"
    assert launcher.train(options, 1, tmp_path / "log", entry) == [0]
    assert [row["step"] for row in metrics(run_dir) if "loss" in row] == list(range(1, 21))


def test_metrics_that_cannot_be_written_stop_the_run(
    toy_tokens: Path, tmp_path: Path, train_here: Callable[[list[str]], Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A full disk, as the kernel reports it: the message says what, where and why."""
    full = Path("/dev/full")
    if sys.platform != "linux" or not full.exists():
        pytest.skip("/dev/full is needed")
    run_dir = tmp_path / "run"
    original = RunLogger.step

    def step(self: RunLogger, row: dict[str, object]) -> None:
        if row["step"] == 8:
            self._file.close()
            self._file = full.open("a")
        original(self, row)

    monkeypatch.setattr(RunLogger, "step", step)
    with pytest.raises(RunError, match=r"metrics\.jsonl.*step 8.*No space"):
        train_here(toy_options(toy_tokens, run_dir))
    monkeypatch.undo()
    train_here(toy_options(toy_tokens, run_dir))
    assert [row["step"] for row in metrics(run_dir) if "loss" in row] == list(range(1, 21))
