"""Killed at any moment and resumed, a run is the run that was never killed, to the last bit."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from megaphi.checkpoint.manifest import find_checkpoints
from tests.helpers import (
    child_environment,
    curve,
    metrics,
    run_training,
    toy_options,
    train_command,
)

STEPS = 60


def options_of(toy_tokens: Path, run_dir: Path) -> list[str]:
    """Sixty steps with dropout and accumulation, saved every seven."""
    return toy_options(
        toy_tokens, run_dir, train__steps=STEPS, checkpoint__interval=7, data__prefetch_batches=3
    )


def final_tensors(run_dir: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor of the newest checkpoint, by shard file and name, as bytes."""
    tensors = {}
    for path in find_checkpoints(run_dir)[0].glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[path.name, name] = file.get_tensor(name).tobytes()
    return tensors


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(
    request: pytest.FixtureRequest, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """Number of processes, and the run directory of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = run_training(options_of(toy_tokens, run_dir), request.param)
    assert done.returncode == 0, done.stderr
    return request.param, run_dir


def kill_at_random(command: list[str], run_dir: Path, generator: random.Random) -> bool:
    """Start a run, kill the whole group at a random moment; False if it finished before."""
    process = subprocess.Popen(
        command,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    path = run_dir / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_size == before):
        time.sleep(0.01)  # until it trains: start-up alone takes seconds
    time.sleep(generator.uniform(0.0, 0.8))
    finished = process.poll() is not None
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.wait()
    return not finished


def test_sigkill_and_resume_is_bitwise(
    uninterrupted: tuple[int, Path], toy_tokens: Path, tmp_path: Path
) -> None:
    processes, straight = uninterrupted
    seed = random.SystemRandom().randrange(1000)
    print(f"seed {seed}")
    generator = random.Random(seed)
    run_dir = tmp_path / "run"
    command = train_command(options_of(toy_tokens, run_dir), processes)
    kills = 0
    while kill_at_random(command, run_dir, generator) and kills < 3:
        kills += 1
    done = run_training(options_of(toy_tokens, run_dir), processes)
    assert done.returncode == 0, done.stderr
    assert kills > 0
    assert curve(run_dir) == curve(straight)
    steps = [row["step"] for row in metrics(run_dir) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert final_tensors(run_dir) == final_tensors(straight)


def test_sigterm_saves_and_resumes_bitwise(
    uninterrupted: tuple[int, Path], toy_tokens: Path, tmp_path: Path
) -> None:
    """One process exits with 75. Torchrun hands the signal on and has a status of its own."""
    processes, straight = uninterrupted
    run_dir = tmp_path / "run"
    options = options_of(toy_tokens, run_dir)
    process = subprocess.Popen(
        train_command(options, processes),
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 10:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 if processes == 1 else process.returncode != 0
    saved = int(find_checkpoints(run_dir)[0].name.removeprefix("step-"))
    assert f"stopped on request and saved at step {saved}" in errors
    assert saved == max(row["step"] for row in metrics(run_dir))
    assert saved < STEPS
    done = run_training(options, processes)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run_dir}/step-{saved:08d}" in done.stdout
    assert curve(run_dir) == curve(straight)
    assert final_tensors(run_dir) == final_tensors(straight)


def test_interrupting_exits_130_and_keeps_the_last_checkpoint(
    toy_tokens: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = options_of(toy_tokens, run_dir)
    process = subprocess.Popen(
        train_command(options), env=child_environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not find_checkpoints(run_dir):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    done = run_training(options)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
