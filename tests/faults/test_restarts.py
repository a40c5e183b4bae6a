"""A launcher that starts a run again after a crash, as long as that helps."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megaphi.resilience.restarts import main, refusal
from tests.faults.test_resume import final_tensors
from tests.helpers import curve, toy_options
from tests.launch.test_launch_scripts import LAUNCH, start, trainers, wait_for_steps
from tests.layouts import Launcher


def options_of(tokens: Path, run_dir: Path) -> list[str]:
    """Long enough to be hit in the middle."""
    return toy_options(tokens, run_dir, train__steps=60, checkpoint__interval=7)


def test_a_killed_rank_is_followed_by_a_restart(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """By itself, to the bits of a run that nobody disturbed; no process is left behind."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert launcher.train(options_of(toy_tokens, straight), 2, tmp_path / "log") == [0, 0]
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


STAND_IN = """#!/usr/bin/env bash
# a python: torchrun's part is to end with the next status and at the next step of PLAN
if [ "$2" != torch.distributed.run ]; then exec {python} "$@"; fi
read -r status step < <(sed -n "$(($(wc -l <{folder}/starts) + 1))p" {folder}/plan)
echo "$@" >>{folder}/starts
echo "{{\\"step\\": $step}}" >>{folder}/run/metrics.jsonl
echo "0 $status" >>"$state/statuses"
[ "$status" -eq 0 ]
"""


@pytest.mark.parametrize(
    ("plan", "restarts", "status", "words"),
    [
        # hung, crashed, done
        ([(4, 10), (1, 20), (0, 30)], 3, 0, "restart 2 of 3"),
        # a second time no further than the first
        ([(1, 10), (4, 10)], 3, 4, "it got to step 10, no further than before"),
        ([(1, 10), (1, 20)], 1, 1, "the limit of 1 restarts"),
        ([(75, 10)], 3, 75, "stopped on request"),
        ([(2, 10)], 3, 2, ""),
    ],
)
def test_which_ends_a_node_answers_with_a_restart(
    plan: list[tuple[int, int]], restarts: int, status: int, words: str, tmp_path: Path
) -> None:
    """A crash or a hang, as long as it gets further; the trainer is a stand-in."""
    (tmp_path / "run").mkdir()
    (tmp_path / "starts").touch()
    (tmp_path / "plan").write_text("".join(f"{end} {step}\n" for end, step in plan))
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    command = [str(LAUNCH / "train_node.sh"), f"--train.run_dir={tmp_path / 'run'}"]
    command += ["--train.steps=30", "--data.train=tokens"]
    environment = {"PYTHON": str(python), "GPUS": "1", "RESTARTS": str(restarts)}
    process = start(command, tmp_path, **environment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert words in errors
    assert len((tmp_path / "starts").read_text().splitlines()) == len(plan)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["nowhere.yaml"], {}, "nowhere.yaml: no such recipe file"),
        (["--train.stepz=3"], {}, "nearest known key is train.steps"),
        (["--train.run_dir=r"], {"RESTARTS": "often"}, "RESTARTS=often is not a number"),
        (["--train.run_dir=r"], {"GPUS": "all"}, "GPUS=all is not a number of processes"),
    ],
)
def test_a_wrong_call_ends_before_anything_is_started(
    words: list[str], environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    """With status 2, and said once, not by every process."""
    values = {"GPUS": "2", "PREFLIGHT": "1"} | environment
    process = start([str(LAUNCH / "train_node.sh"), *words], tmp_path, **values)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count(said) == 1, errors
    assert "torch" not in output + errors


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
    assert "status 4 at step 33; restart 1 of 2 continues from step 30" in captured.err
    assert main(["decide", "2", "2", "4", "33", *recipe]) == 1
    assert len((run_dir / "restarts.jsonl").read_text().splitlines()) == 1
