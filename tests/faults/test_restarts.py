"""A launcher that starts a run again after a crash, as long as that helps."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megaphi.resilience.restarts import main, refusal
from tests.faults.test_resume import final_tensors
from tests.helpers import curve, run_training, toy_options
from tests.launch.test_launch_scripts import LAUNCH, start, trainers, wait_for_steps


def options_of(tokens: Path, run_dir: Path) -> list[str]:
    """Long enough to be hit in the middle."""
    return toy_options(tokens, run_dir, train__steps=60, checkpoint__interval=7)


def test_a_killed_rank_is_followed_by_a_restart(toy_tokens: Path, tmp_path: Path) -> None:
    """By itself, to the bits of a run that nobody disturbed; no process is left behind."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert run_training(options_of(toy_tokens, straight), 2).returncode == 0
    command = [str(LAUNCH / "train_node.sh"), *options_of(toy_tokens, run_dir)]
    process = start(command, tmp_path, GPUS="2", RESTARTS="2")
    wait_for_steps(process, run_dir, 9)
    first = trainers(run_dir)
    os.kill(first[-1], signal.SIGKILL)
    while set(first) & set(trainers(run_dir)):
        time.sleep(0.02)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "was killed by signal 9" in errors
    assert "restart 1 of 2" in errors
    (row,) = [json.loads(li) for li in (run_dir / "restarts.jsonl").read_text().splitlines()]
    assert row["status"] == 1
    assert row["step"] >= 9
    assert f"step-{row['from_step']:08d}" in output
    events = [json.loads(li) for li in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event.get("event") == "resume"]
    assert event["step"] == row["from_step"]
    assert curve(run_dir) == curve(straight)
    assert final_tensors(run_dir) == final_tensors(straight)
    assert trainers(run_dir) == []


def test_a_run_that_gets_nowhere_is_not_started_again(toy_tokens: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "step-00000005.corrupt-1").mkdir(parents=True)
    command = [str(LAUNCH / "train_node.sh"), *options_of(toy_tokens, run_dir)]
    process = start(command, tmp_path, GPUS="1", RESTARTS="3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("none of its checkpoints verifies") == 1
    assert "not started again after status 1: it got to step 0, no further than before" in errors


@pytest.mark.parametrize(
    ("attempt", "reached", "step", "words"),
    [
        (1, 0, 5, None),
        (3, 40, 41, None),
        (4, 40, 90, "the limit of 3 restarts"),
        (1, 40, 40, "no further than before"),
        (2, 40, 12, "no further than before"),
    ],
)
def test_when_a_run_is_started_again(
    attempt: int, reached: int, step: int, words: str | None
) -> None:
    reason = refusal(attempt, 3, reached, step)
    assert (reason is None) if words is None else words in str(reason)


def test_what_a_run_has_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step in a checkpoint's name where it starts, the last reported step where it ended."""
    run_dir = tmp_path / "run"
    recipe = ["--train.run_dir", str(run_dir), "--train.steps=9", "--data.train=tokens"]
    assert main(["begin", *recipe]) == 0
    assert capsys.readouterr().out == "0\n"
    (run_dir / "step-00000030").mkdir(parents=True)
    assert main(["begin", *recipe]) == 0
    assert capsys.readouterr().out == "30\n"
    (run_dir / "metrics.jsonl").write_text('{"step": 33, "loss": 1.0}\n{"step": 34, "lo')
    assert main(["decide", "1", "2", "4", "30", *recipe]) == 0
    captured = capsys.readouterr()
    assert captured.out == "33\n"
    assert "status 4 at step 33; restart 1 of 2 goes on from step 30" in captured.err
    assert main(["decide", "2", "2", "4", "33", *recipe]) == 1
    assert len((run_dir / "restarts.jsonl").read_text().splitlines()) == 1
