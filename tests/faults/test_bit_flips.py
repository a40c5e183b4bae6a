"""A checkpoint with one wrong bit, or a file that is cut, empty or of another step, is not used."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megaphi.checkpoint import manager as manager_module
from megaphi.formats.manifest import CheckpointError, find_checkpoints, read_manifest
from tests.faults.save_trials import BEFORE, NEW, OLD, Saves, bit_flips
from tests.faults.small_saves import manager_of, state, trainer_state
from tests.faults.training_trials import damage


@pytest.fixture
def run_dir(saves: Saves, tmp_path: Path) -> Path:
    """A run with checkpoints of two steps, written by two processes."""
    return Path(shutil.copytree(saves.base(2), tmp_path / "run"))


def test_two_hundred_flipped_bits(saves: Saves, generator: random.Random) -> None:
    """Each is found; the message names the file; the checkpoint before is used."""
    outcome = bit_flips(saves, 200, generator)
    assert outcome.violations == []
    assert outcome.figures["detected"] == outcome.trials == 200


def test_any_bit_of_the_manifest(run_dir: Path, generator: random.Random) -> None:
    """One bit of each byte: nothing in it can change unseen, white space neither."""
    path = find_checkpoints(run_dir)[0] / "manifest.json"
    sound = path.read_bytes()
    for place in range(len(sound)):
        changed = bytearray(sound)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(path.parent)
    path.write_bytes(sound)
    assert read_manifest(path.parent)["step"] == BEFORE


@pytest.mark.parametrize("how", ["truncated", "zeroed", "deleted", "swapped"])
def test_damaged_files(
    run_dir: Path, how: str, generator: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = find_checkpoints(run_dir)
    path = damage(newest, older, how, generator)
    with manager_of(run_dir, asynchronous=False) as manager:
        assert manager.find() == older
    assert f"damaged checkpoint: {path}" in capsys.readouterr().err
    assert [p.name for p in find_checkpoints(run_dir)] == [f"step-{OLD:08d}"]


def test_shards_of_two_processes_exchanged(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same size, sound in themselves, of the same step."""
    newest, older = find_checkpoints(run_dir)
    first, second = (newest / f"shard-0000{n}-model-00001-of-00002.safetensors" for n in (1, 2))
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with manager_of(run_dir, asynchronous=False) as manager:
        assert manager.find() == older
    assert str(first) in capsys.readouterr().err


def test_a_whole_checkpoint_of_another_step_under_this_name(run_dir: Path) -> None:
    """Renamed by hand: every file verifies, but the manifest says another step."""
    newest, older = find_checkpoints(run_dir)
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with manager_of(run_dir, asynchronous=False) as manager:
        assert manager.find() == older


def test_a_disk_that_changes_what_was_written_is_found_by_the_save(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint is read again before `latest` names it and an older one is dropped."""
    publish = manager_module.publish_directory

    def publish_and_damage(temporary: Path, final: Path) -> None:
        publish(temporary, final)
        damage(final, final, "bit flip", random.Random(1))

    before = find_checkpoints(run_dir)
    latest = (run_dir / "latest").read_text()
    monkeypatch.setattr(manager_module, "publish_directory", publish_and_damage)
    with manager_of(run_dir, asynchronous=False) as manager:
        with pytest.raises(CheckpointError, match="just written does not verify"):
            manager.save(NEW, state(NEW, manager.mesh), trainer_state(NEW))
        assert find_checkpoints(run_dir)[1:] == before
        assert (run_dir / "latest").read_text() == latest
        assert manager.find() == before[0]


def test_a_file_that_does_not_belong_to_a_checkpoint(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another shard would be read with the others: which are there decides what is loaded."""
    newest, older = find_checkpoints(run_dir)
    stranger = newest / "shard-00009-model-00001-of-00002.safetensors"
    shutil.copy(next(older.glob("*.safetensors")), stranger)
    with manager_of(run_dir, asynchronous=False) as manager:
        assert manager.find() == older
    assert f"damaged checkpoint: {stranger}: not listed" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["link", "directory", "absent", "negative", "newer", "binary"])
def test_the_hint_may_be_anything(run_dir: Path, how: str, tmp_path: Path) -> None:
    """`latest` names no checkpoint that is there: the newest that verifies is used."""
    latest = run_dir / "latest"
    latest.unlink()
    if how == "link":
        (tmp_path / "precious").write_text("of somebody")
        latest.symlink_to(tmp_path / "precious")
    elif how == "directory":
        latest.mkdir()
    elif how != "absent":
        content = {"negative": b"step--0000001\n", "newer": b"step-00000099\n", "binary": b"\xff\0"}
        latest.write_bytes(content[how])
    with manager_of(run_dir, asynchronous=False) as manager:
        found = manager.find()
    assert found == run_dir / f"step-{BEFORE:08d}"
    assert json.loads((found / "manifest.json").read_text())["step"] == BEFORE
    if how == "link":
        assert (tmp_path / "precious").read_text() == "of somebody"
