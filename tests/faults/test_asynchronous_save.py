"""What hits a run of two processes while one of its checkpoints is written beside the training."""

from pathlib import Path

import pytest

from megaphi.formats.manifest import find_checkpoints, verify_checkpoint
from tests.faults.test_resume import final_tensors
from tests.helpers import curve, metrics, toy_options
from tests.layouts import Launcher

STEPS = 24


def train(
    launcher: Launcher, tokens: Path, run_dir: Path, entry: str, asynchronous: str = "true"
) -> tuple[list[int], str]:
    """Train on two processes; exit statuses and output."""
    # no evaluation of step 10: a request to stop would end the run there
    options = toy_options(
        tokens, run_dir, train__steps=STEPS, train__evaluation_interval=7,
        checkpoint__asynchronous=asynchronous,
    )  # fmt: skip
    log = run_dir.parent / f"{run_dir.name}-{entry}.log"
    statuses = launcher.train(options, 2, log, entry)
    return statuses, log.read_text()


@pytest.fixture(scope="module")
def straight(
    launcher: Launcher, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing disturbs and that waits for its checkpoints."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    statuses, printed = train(launcher, toy_tokens, run_dir, "megaphi.train:main", "false")
    assert statuses == [0, 0], printed
    return run_dir


def disturb(launcher: Launcher, tokens: Path, run_dir: Path, how: str) -> tuple[list[int], str]:
    """Train until step 10's save meets a fault; the exit statuses and output."""
    return train(launcher, tokens, run_dir, f"tests.checkpoint.trainings:{how}")


def assert_resumes(launcher: Launcher, tokens: Path, run_dir: Path, straight: Path) -> str:
    """Train to the end, to the bits of a run that nothing disturbed; returns the output."""
    statuses, printed = train(launcher, tokens, run_dir, "megaphi.train:main")
    assert statuses == [0, 0], printed
    assert "written in the background" in printed
    assert curve(run_dir) == curve(straight)
    assert final_tensors(run_dir) == final_tensors(straight)
    assert not list(run_dir.glob(".step-*"))
    return printed


def test_killed_in_a_save(
    launcher: Launcher, straight: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """The checkpoint before is used; the half one is no checkpoint; nobody hangs."""
    run_dir = tmp_path / "run"
    statuses, printed = disturb(launcher, toy_tokens, run_dir, "killed_in_a_save")
    assert statuses == [1, -9], printed
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-00000005"]
    assert (run_dir / ".step-00000010.tmp").is_dir()
    assert metrics(run_dir)[-1]["step"] >= 10  # training had gone on
    printed = assert_resumes(launcher, toy_tokens, run_dir, straight)
    assert "resuming from" in printed
    assert "step-00000005" in printed


def test_asked_to_stop_in_a_save(
    launcher: Launcher, straight: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """That save and the one that the request causes are both complete."""
    run_dir = tmp_path / "run"
    statuses, printed = disturb(launcher, toy_tokens, run_dir, "stopped_in_a_save")
    assert statuses == [75, 75], printed
    newest, before = find_checkpoints(run_dir)
    assert before.name == "step-00000010"
    assert f"saved at step {int(newest.name[5:])}" in printed
    for checkpoint in (newest, before):
        verify_checkpoint(checkpoint)
    assert (run_dir / "latest").read_text() == f"{newest.name}\n"
    assert_resumes(launcher, toy_tokens, run_dir, straight)


def test_one_process_cannot_write(
    launcher: Launcher, straight: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """All of them stop at the same step and say why."""
    run_dir = tmp_path / "run"
    statuses, printed = disturb(launcher, toy_tokens, run_dir, "full_disk_in_a_save")
    assert statuses == [1, 1], printed
    for rank in (0, 1):
        line = next(li for li in printed.splitlines() if f"[rank {rank}]: error" in li)
        assert "could not be written by process 1: [Errno 28] No space left on device" in line
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-00000005"]
    assert (run_dir / "latest").read_text() == "step-00000005\n"
    assert_resumes(launcher, toy_tokens, run_dir, straight)


def test_a_failed_save_does_not_wait_for_the_next(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """What is trained after a failed save is lost, so the run ends as soon as it has failed."""
    run_dir = tmp_path / "run"
    entry = "tests.faults.faulty_trainings:failed_save"
    statuses, printed = train(launcher, toy_tokens, run_dir, entry)
    assert statuses == [1, 1], printed
    assert "by process 1: [Errno 28] No space left on device" in printed
    assert metrics(run_dir)[-1]["step"] < 15


def test_a_thread_that_breaks_alone_does_not_hang_the_others(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """Rank 0's thread waits for rank 1's answer, which never comes; rank 1's exit ends that."""
    run_dir = tmp_path / "run"
    statuses, printed = disturb(launcher, toy_tokens, run_dir, "broken_thread_in_a_save")
    assert statuses == [1, 1], printed
    assert "a fault of the program" in printed
    assert (run_dir / "latest").read_text() == "step-00000005\n"
