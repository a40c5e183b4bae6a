"""Killed at any moment and resumed, a run is the run that was never killed, to the last bit."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from megaphi.formats.manifest import find_checkpoints
from tests.helpers import child_environment, curve, metrics, toy_options, train_command
from tests.layouts import Launcher

STEPS = 100


def options_of(toy_tokens: Path, run_dir: Path) -> list[str]:
    """A hundred steps with dropout and accumulation, saved every seven."""
    return toy_options(
        toy_tokens, run_dir, train__steps=STEPS, checkpoint__interval=7, data__prefetch_batches=3
    )


def tensors_of(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor of a checkpoint, by shard file and name, as bytes."""
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[path.name, name] = file.get_tensor(name).tobytes()
    return tensors


def final_tensors(run_dir: Path) -> dict[tuple[str, str], bytes]:
    """Those of the newest checkpoint of a run."""
    return tensors_of(find_checkpoints(run_dir)[0])


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(
    request: pytest.FixtureRequest, launcher: Launcher, toy_tokens: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path]:  # fmt: skip
    """Number of processes, and the run directory of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    resume(launcher, options_of(toy_tokens, run_dir), request.param)
    return request.param, run_dir


def resume(launcher: Launcher, options: list[str], processes: int) -> str:
    """Train to the end; what was printed."""
    log = Path(next(o for o in options if "run_dir" in o).partition("=")[2]).with_suffix(".log")
    log.unlink(missing_ok=True)
    statuses = launcher.train(options, processes, log)
    assert set(statuses) == {0}, log.read_text()
    return log.read_text()


def start(options: list[str], processes: int, ready: Callable[[], bool]) -> subprocess.Popen[str]:
    """Start a training as users do, and wait until it has come so far."""
    process = subprocess.Popen(
        train_command(options, processes), env=child_environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def has_trained(run_dir: Path, steps: int) -> bool:
    """Whether a run has reported so many steps."""
    return (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= steps


def processes_of(run_dir: Path) -> list[int]:
    """Those that train into a directory; torchrun gives each of its own a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--train.run_dir={run_dir}" in path.read_bytes().decode().split("\0"):
                found.append(int(path.parent.name))
    return found


def test_sigkill_and_resume_is_bitwise(
    uninterrupted: tuple[int, Path], launcher: Launcher, toy_tokens: Path, tmp_path: Path,
    generator: random.Random,
) -> None:  # fmt: skip
    """All processes at a random moment; test_random_kills does it often."""
    processes, straight = uninterrupted
    run_dir = tmp_path / "run"
    options = options_of(toy_tokens, run_dir)
    process = start(options, processes, lambda: has_trained(run_dir, 1))
    time.sleep(generator.uniform(0.0, 0.3))
    victims = processes_of(run_dir)
    assert len(victims) == (1 if processes == 1 else 1 + processes)  # and torchrun
    for number in victims:
        os.kill(number, signal.SIGKILL)
    process.communicate()
    assert not has_trained(run_dir, STEPS), "it was over before it could be killed"
    resume(launcher, options, processes)
    assert curve(run_dir) == curve(straight)
    steps = [row["step"] for row in metrics(run_dir) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert final_tensors(run_dir) == final_tensors(straight)


def test_sigterm_saves_and_resumes_bitwise(
    uninterrupted: tuple[int, Path], launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """One process exits with 75. Torchrun hands the signal on and has a status of its own."""
    processes, straight = uninterrupted
    run_dir = tmp_path / "run"
    options = options_of(toy_tokens, run_dir)
    process = start(options, processes, lambda: has_trained(run_dir, 10))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 if processes == 1 else process.returncode != 0
    saved = int(find_checkpoints(run_dir)[0].name.removeprefix("step-"))
    assert f"stopped on request and saved at step {saved}" in errors
    assert saved == max(row["step"] for row in metrics(run_dir))
    assert saved < STEPS
    printed = resume(launcher, options, processes)
    assert f"resuming from {run_dir}/step-{saved:08d}" in printed
    assert curve(run_dir) == curve(straight)
    assert final_tensors(run_dir) == final_tensors(straight)


def test_interrupting_exits_130_and_keeps_the_last_checkpoint(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = options_of(toy_tokens, run_dir)
    process = start(options, 1, lambda: bool(find_checkpoints(run_dir)))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "resuming from" in resume(launcher, options, 1)
