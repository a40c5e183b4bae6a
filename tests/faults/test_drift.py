"""What is different when a run goes on: refused, said or free, by the documented table."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megaphi.checkpoint.drift import FACTS, RECIPE_KEYS, rule_of
from megaphi.checkpoint.resume import STATE_KEYS
from megaphi.config import Recipe
from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.data.sidecar import TokenFileInfo, write_info, written_facts
from megaphi.formats.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    find_checkpoints,
    read_manifest,
    write_manifest,
)
from megaphi.recipe_file import recipe_keys
from tests.helpers import REPOSITORY, metrics, toy_options

Train = Callable[[list[str]], Recipe]
# one more step than the checkpoint has
PINNED = {"train__steps": 6, "data__planned_samples": 400, "schedule__decay_steps": 20}


def write_tokens(
    prefix: Path, tokenizer: str = "ab", described: bool = True, first: int = 0
) -> None:
    """Write a token file of 512 ids; `first` decides which."""
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for start in range(first, first + 200):
            writer.add_document([*((np.arange(40) * 3 + start) % 500).tolist(), 511])
    if described:
        facts = written_facts(writer)
        info = TokenFileInfo(
            tokenizer="test", tokenizer_sha256=tokenizer * 32, vocab_size=512, eod_id=511,
            recipe={}, **facts,
        )  # fmt: skip
        write_info(prefix, info)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token file, and a run on it that was saved at step 5."""
    from megaphi.parallel.mesh import processes
    from megaphi.recipe_file import load_recipe
    from megaphi.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("saved")
    write_tokens(folder / "tokens")
    recipe = load_recipe(
        toy_options(
            folder / "tokens",
            folder / "run",
            **{**PINNED, "train__steps": 5},
            train__evaluation_interval=100,
        )
    )
    with processes() as mesh:
        Trainer(recipe, mesh).run()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, with the dates of its files."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def resume(folder: Path, train_here: Train, **changes: object) -> None:
    """Go on for one step."""
    options = toy_options(folder / "tokens", folder / "run", **PINNED)
    train_here([*options, *(f"--{k.replace('__', '.')}={v}" for k, v in changes.items())])


def edit(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "trainer") -> None:
    """Change a JSON file of the checkpoint, and vouch for it anew."""
    (checkpoint,) = find_checkpoints(folder / "run")
    path = checkpoint / f"{name}.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    vouch(checkpoint)


def vouch(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint that was changed."""
    manifest = read_manifest(checkpoint)
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint, {}, {key: manifest[key] for key in ("step", "processes")})


def test_the_page_says_what_the_code_does() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    said = {(row[0].strip("| `"), row[1], row[2].strip("| ")) for row in rows if len(row) == 3}
    assert {(rule.what, rule.action, rule.why) for rule in (*FACTS, *RECIPE_KEYS)} <= said


def test_every_key_of_a_recipe_has_a_rule() -> None:
    for key in recipe_keys():
        assert rule_of(key).why
    used = {rule_of(key).what for key in recipe_keys()}
    assert used == {rule.what for rule in RECIPE_KEYS}  # and every rule a key
    assert {row.action for row in (*FACTS, *RECIPE_KEYS)} == {"refuse", "warn", "accept"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer.learning_rate": 0.002}, "optimizer.learning_rate was 0.001, is 0.002"),
        ({"schedule.warmup_steps": 3}, "schedule.warmup_steps was 5, is 3"),
        ({"schedule.decay_steps": 30}, "schedule.decay_steps was 20, is 30"),
        ({"train.micro_batch_size": 4}, "train.micro_batch_size was 2, is 4"),
        ({"train.spike_window": 7}, "train.spike_window was 100, is 7"),
        ({"model.residual_dropout": 0.2}, "model.residual_dropout was 0.1, is 0.2"),
        ({"parallel.recompute": "full"}, "parallel.recompute was none, is full"),
        ({"precision.dtype": "bf16"}, "precision.dtype was fp32, is bf16"),
        ({"compute.attention": "plain"}, "compute.attention was auto, is plain"),
        ({"data.mask_documents": "true"}, "data.mask_documents was False, is True"),
    ],
)
def test_what_changes_the_numbers_is_said(
    change: dict[str, object], said: str, folder: Path, train_here: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    resume(folder, train_here, **change)
    (line,) = [li for li in capsys.readouterr().out.splitlines() if "other settings" in li]
    assert line == f"going on with other settings: {said}"
    assert [row["step"] for row in metrics(folder / "run") if "loss" in row] == list(range(1, 7))


def test_what_does_not_matter_is_not_said(
    folder: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among it that the files lie elsewhere now."""
    resume(
        folder, train_here, checkpoint__interval=3, logging__interval=2, data__prefetch_batches=1,
        train__evaluation_interval=3, train__hang_seconds=99,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "resuming from" in printed
    assert "other settings" not in printed
    assert "not bitwise" not in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.seed": 5}, "train.seed was 1234, is 5"),
        ({"data.sequence_length": 16}, "data.sequence_length was 32, is 16"),
        ({"data.split": "80,20,0"}, "data.split was 90,10,0, is 80,20,0"),
        ({"data.planned_samples": 500}, "data.planned_samples was 400, is 500"),
        ({"train.global_batch_size": 4}, "train.global_batch_size=4 does not fit"),
        ({"model.num_layers": 1}, "model.num_layers was 2, is 1"),
        ({"model.rotary_base": 5000.0}, "model.rotary_base was 10000.0, is 5000.0"),
    ],
)
def test_another_run_is_refused(
    change: dict[str, object], words: str, folder: Path, train_here: Train
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        resume(folder, train_here, **change)


def test_another_blend_is_refused(folder: Path, train_here: Train) -> None:
    """The same files in other shares."""
    tokens = folder / "tokens"
    options = {"train__steps": 5, "train__run_dir": folder / "blend"}
    resume(folder, train_here, **options, data__train=f"[0.5, {tokens}, 0.5, {tokens}]")
    options["train__steps"] = 6
    with pytest.raises(ValueError, match=r"data\.train.*\[0\.5, 0\.5\]"):
        resume(folder, train_here, **options, data__train=f"[0.4, {tokens}, 0.6, {tokens}]")


def test_another_corpus_is_refused(folder: Path, train_here: Train) -> None:
    """Of as many documents and tokens, with its own description."""
    write_tokens(folder / "tokens", first=1)
    with pytest.raises(ValueError, match="token files"):
        resume(folder, train_here)


def test_another_tokenizer_is_refused(folder: Path, train_here: Train) -> None:
    write_tokens(folder / "tokens", tokenizer="cd")
    with pytest.raises(ValueError, match="tokenizer of"):
        resume(folder, train_here)


def flip_a_byte(path: Path) -> None:
    """Change one byte in the middle, as a program or a bad copy would."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_changed_byte_of_the_corpus_is_refused(folder: Path, train_here: Train) -> None:
    flip_a_byte(folder / "tokens.bin")
    with pytest.raises(RuntimeError, match=r"tokens\.bin: SHA-256 differs"):
        resume(folder, train_here)


def test_a_newer_copy_of_the_same_corpus_is_not_refused(
    folder: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokens.bin").touch()
    resume(folder, train_here)
    assert "not bitwise" not in capsys.readouterr().out


def test_a_corpus_without_description_that_was_written_to_is_said(
    tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", described=False)
    resume(tmp_path, train_here, train__steps=5)
    flip_a_byte(tmp_path / "tokens.bin")
    resume(tmp_path, train_here)
    assert "tokens.bin was written to since" in capsys.readouterr().out


def test_another_environment_is_said(
    folder: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fact that the checkpoint has."""

    def change(state: dict[str, Any]) -> None:
        state["environment"] = dict.fromkeys(state["environment"], "other")

    edit(folder, change)
    resume(folder, train_here)
    printed = capsys.readouterr().out
    facts = ("torch", "CUDA", "device", "CPU instructions", "threads", "processes", "layout",
             "precision", "attention", "compiled")  # fmt: skip
    documented = {row.what: row.action for row in (*FACTS, *RECIPE_KEYS)}
    for fact in facts:
        assert f"{fact} was other, is " in printed or f"{fact} changed" in printed, fact
        assert documented[fact] == "warn"


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_missing_item_of_the_state_is_refused(key: str, folder: Path, train_here: Train) -> None:
    edit(folder, lambda state: state.pop(key))
    with pytest.raises(CheckpointError, match=f"{key} missing"):
        resume(folder, train_here)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 0),
        ("consumed_samples", 0),
        ("optimizer_updates", 0),
        ("skipped_updates", 3),
        ("data_order", {}),
        ("token_file_dates", []),
    ],
)
def test_an_item_of_the_state_that_was_reset_is_refused(
    key: str, value: object, folder: Path, train_here: Train
) -> None:
    edit(folder, lambda state: state.update({key: value}))
    with pytest.raises((CheckpointError, ValueError), match=r"step-00000005|token_file_dates"):
        resume(folder, train_here)


def test_forgotten_rewinds_are_refused(folder: Path, train_here: Train) -> None:
    """The list of samples left out is part of the state, and of the run directory."""
    spike = {"first_step": 4, "last_step": 4, "loss": 9.0, "mean": 1.0, "deviation": 0.1}
    record = {"spike": spike, "void_after": 2, "skipped": [[16, 32]]}
    edit(folder, lambda state: state.update(rewinds=[record]))
    (folder / "run" / "rewinds.json").write_text(json.dumps([{**record, "skipped": [[8, 32]]}]))
    with pytest.raises(ValueError, match=r"rewinds\.json"):
        resume(folder, train_here)
    (folder / "run" / "rewinds.json").unlink()
    resume(folder, train_here)
    assert json.loads((folder / "run" / "rewinds.json").read_text()) == [record]


@pytest.mark.parametrize("kind", ["model", "optimizer.first_moment", "optimizer.second_moment"])
def test_a_missing_tensor_is_refused(kind: str, folder: Path, train_here: Train) -> None:
    (checkpoint,) = find_checkpoints(folder / "run")
    (path,) = checkpoint.glob("*.safetensors")
    tensors = load_file(path)
    name = f"{kind}.blocks.1.qkv.weight"
    assert name in tensors
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    vouch(checkpoint)
    with pytest.raises(CheckpointError, match=r"does not fit this model"):
        resume(folder, train_here)
