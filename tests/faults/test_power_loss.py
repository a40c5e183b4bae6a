"""The power fails after any file-system call of a save: what was not synced may be gone or zero."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from megaphi.metrics.logger import METRICS_NAME, keep_metrics_until
from tests.faults.disk_model import SURVIVORS, Disk, read_image
from tests.faults.file_calls import watch_files
from tests.faults.save_trials import Kind, Saves, power_loss


@pytest.mark.parametrize(
    ("kind", "new"), [(Kind(1, True), True), (Kind(2, False), False)],
    ids=["first save", "next save"],
)  # fmt: skip
def test_power_fails(saves: Saves, kind: Kind, new: bool, generator: random.Random) -> None:
    """The first save of a run also makes its directory, and those above; the soak has the rest."""
    outcome = power_loss(saves, kind, generator, new)
    assert outcome.violations == []
    assert 0 < outcome.figures["resumed_from_new"] < outcome.trials


def test_metrics_survive_the_start_of_a_run(tmp_path: Path, generator: random.Random) -> None:
    """Rows after the checkpoint are dropped; a file that is cut, empty or zero never takes over."""
    run_dir, before = tmp_path / "run", tmp_path / "before"
    run_dir.mkdir()
    rows = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 200)]
    (run_dir / METRICS_NAME).write_text("".join(rows) + '{"step": 200, "lo')
    shutil.copytree(run_dir, before)
    with watch_files(run_dir, 0, lambda *_: None) as calls:
        keep_metrics_until(run_dir / METRICS_NAME, 150)
    kept = "".join(rows[:150]).encode()
    allowed = {kept, (before / METRICS_NAME).read_bytes()}
    disk = Disk(before)
    for call in calls:
        disk.apply(call)
        for survivors in SURVIVORS:
            assert disk.image(survivors, generator)[METRICS_NAME] in allowed, (call, survivors)
    assert {disk.image(survivors, generator)[METRICS_NAME] for survivors in SURVIVORS} == {kept}
    assert [path.name for path in run_dir.iterdir()] == [METRICS_NAME]


def test_what_the_model_takes_away(tmp_path: Path) -> None:
    """Names and bytes each need a sync of their own; a rename takes effect as a whole."""
    (tmp_path / "old").write_text("before")
    disk, rng = Disk(tmp_path), random.Random(0)
    with watch_files(tmp_path) as calls:
        (tmp_path / "new").write_text("content")
        (tmp_path / "old").rename(tmp_path / "older")
    for call in calls:
        disk.apply(call)
    assert disk.image(("kept", "kept"), rng) == read_image(tmp_path)
    assert disk.image(("lost", "kept"), rng) == {"old": b"before"}
    assert disk.image(("kept", "lost"), rng) == {"new": b"", "older": b"before"}
    assert disk.image(("kept", "zeros"), rng) == {"new": bytes(7), "older": b"before"}
    with watch_files(tmp_path) as calls, (tmp_path / "third").open("wb") as file:
        file.write(b"synced")
        file.flush()
        os.fsync(file.fileno())
        descriptor = os.open(tmp_path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        file.write(b"not")
    for call in calls:
        disk.apply(call)
    lost = disk.image(("lost", "lost"), rng)
    assert lost == {"new": b"", "older": b"before", "third": b"synced"}
    assert [call.kind for call in calls] == ["create", "write", "sync", "sync", "write"]
