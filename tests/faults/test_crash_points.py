"""A process that dies at any file-system call of a save leaves a whole checkpoint, old or new."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from megaphi.formats.manifest import CheckpointError, find_checkpoints, verify_checkpoint
from tests.faults.file_calls import Call
from tests.faults.save_trials import (
    BEFORE,
    NEW,
    OLD,
    Kind,
    Saves,
    choose_points,
    crash_points,
)
from tests.faults.small_saves import manager_of, state, trainer_state
from tests.helpers import short_and_slow


@pytest.mark.parametrize(
    "kind",
    short_and_slow([Kind(1, False), Kind(2, True)], [Kind(1, True), Kind(2, False)]),
    ids=str,
)
def test_dies_at_a_call(saves: Saves, kind: Kind, generator: random.Random) -> None:
    """All calls of the plainest save; of the others, the first and last of each kind and more."""
    limit = None if kind == Kind(1, False) else 18
    outcome = crash_points(saves, kind, limit, generator)
    assert outcome.violations == []
    assert outcome.trials >= 18
    # both outcomes were met: before the rename the old one, after it the new one
    assert 0 < outcome.figures["resumed_from_new"] < outcome.trials


def test_the_sample_has_each_kind_of_call_of_each_process() -> None:
    calls = [
        [Call(kind=kind, path="x", process=rank) for kind in kinds]
        for rank, kinds in enumerate([["create", "write", "write", "write", "sync"], ["create"]])
    ]
    chosen = choose_points(calls, 5, random.Random(0))
    assert chosen == [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0)]
    assert len(choose_points(calls, None, random.Random(0))) == 6


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    """The second save of a step is refused, and changes nothing of the first."""
    with manager_of(tmp_path / "run", asynchronous=False) as manager:
        manager.save(BEFORE, state(BEFORE, manager.mesh), trainer_state(BEFORE))
        (checkpoint,) = find_checkpoints(tmp_path / "run")
        before = verify_checkpoint(checkpoint)
        with pytest.raises(CheckpointError, match="already exists"):
            manager.save(BEFORE, state(NEW, manager.mesh), trainer_state(NEW))
    assert verify_checkpoint(checkpoint) == before
    assert not list((tmp_path / "run").glob(".step-*"))


def test_a_checkpoint_that_is_a_link_is_neither_used_nor_deleted(tmp_path: Path) -> None:
    """Retention drops what the run has saved, never what a link leads to."""
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    for directory in (elsewhere, run_dir):
        with manager_of(directory, asynchronous=False) as manager:
            manager.save(OLD, state(OLD, manager.mesh), trainer_state(OLD))
    kept = elsewhere / f"step-{OLD:08d}"
    (run_dir / "step-00000005").symlink_to(kept)
    (run_dir / "step-00000099").symlink_to(kept)
    with manager_of(run_dir, asynchronous=False) as manager:
        assert manager.find() == run_dir / kept.name
        for step in (BEFORE, NEW, NEW + 1):
            manager.save(step, state(step, manager.mesh), trainer_state(step))
    assert [p.name for p in find_checkpoints(run_dir)] == ["step-00000031", "step-00000030"]
    assert (run_dir / "step-00000005").is_symlink()
    verify_checkpoint(kept)


def test_a_checkpoint_that_cannot_be_deleted_yet_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over NFS, a file that an evaluation reads keeps its directory; it goes with a later save."""
    run_dir, delete = tmp_path / "run", shutil.rmtree
    open_file = f"step-{OLD:08d}.deleted"

    def busy(path: Path, **options: bool) -> None:
        if path.name == open_file and not options:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    with manager_of(run_dir, asynchronous=False) as manager:
        for step in (OLD, OLD + 1, OLD + 2, OLD + 3):
            manager.save(step, state(step, manager.mesh), trainer_state(step))
    said = capsys.readouterr().err
    assert f"{run_dir / open_file} is not needed, but could not be deleted" in said
    with manager_of(run_dir, asynchronous=False) as manager:  # nor does it keep one from starting
        assert manager.find() == run_dir / f"step-{OLD + 3:08d}"
        monkeypatch.undo()
        manager.save(OLD + 4, state(OLD + 4, manager.mesh), trainer_state(OLD + 4))
    assert not (run_dir / open_file).exists()


def test_what_the_run_resumed_from_is_never_deleted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with manager_of(run_dir, asynchronous=False) as manager:
        manager.save(OLD, state(OLD, manager.mesh), trainer_state(OLD))
    with manager_of(run_dir, asynchronous=False) as manager:
        found = manager.find()
        assert found is not None
        manager.load(found, lambda _: state(0, manager.mesh))
        for step in range(OLD + 1, OLD + 6):
            manager.save(step, state(step, manager.mesh), trainer_state(step))
    steps = [int(path.name.removeprefix("step-")) for path in find_checkpoints(run_dir)]
    assert steps == [OLD + 5, OLD + 4, OLD]
