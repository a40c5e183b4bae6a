"""A checkpoint belongs to no layout: whoever reads it has the same bits, whoever wrote it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.torch_version import TorchVersion

from megaphi.formats.manifest import find_checkpoints
from megaphi.formats.weights import CheckpointWeights, load_model
from megaphi.generate import generate
from tests.helpers import curve, toy_options
from tests.layouts import Launcher

# the schedule with two stages a process, there and back; PyTorch before 2.13 cannot run it
FOLDED = "zbv" if torch.__version__ >= TorchVersion("2.13") else "interleaved"

SAVED = 3
TRAININGS = "tests.checkpoint.trainings"
# five blocks in two or four stages; no width is a multiple of 8, MLP and vocabulary not even of 4
RECIPE: dict[str, Any] = {
    "model__num_layers": 5,
    "model__num_heads": 4,
    "model__hidden_size": 36,
    "model__intermediate_size": 150,
    "model__vocab_size": 514,
    "train__global_batch_size": 16,
    "train__evaluation_interval": 100,
    "data__planned_samples": 16 * 20,
    "schedule__decay_steps": 20,
    "checkpoint__interval": 100,
    "precision__initial_loss_scale": 1024,
    "precision__loss_scale_interval": SAVED - 1,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline 2 x data 2": {"pipeline": 2},
    "tensor 2 x context 2": {"tensor": 2, "context": 2},
    "two groups of data 2": {"replicate": 2},
    "zbv 2 x tensor 2": {"pipeline": 2, "pipeline_schedule": FOLDED, "tensor": 2},
    "data 2 x tensor 2": {"tensor": 2},
}
FIRST, *OTHERS = LAYOUTS


def train(
    launcher: Launcher, tokens: Path, run_dir: Path, layout: str, entry: str, **overrides: Any
) -> str:
    """Train on four processes in a layout; returns what they printed."""
    axes = {f"parallel__{key}": value for key, value in LAYOUTS[layout].items()}
    options = toy_options(tokens, run_dir, **{**RECIPE, **axes, **overrides})
    log = run_dir.with_suffix(".log")
    statuses = launcher.train(options, 4, log, entry)
    assert statuses == [0] * 4, log.read_text()[-3000:]
    return log.read_text()


def assembled(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint from its shards, each element once."""
    pieces: dict[str, list[tuple[list[int], np.ndarray]]] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                piece = (places[name]["saved_offsets"], file.get_tensor(name))
                pieces.setdefault(name, []).append(piece)
    tensors = {}
    for name, parts in pieces.items():
        ends = [np.add(start, part.shape) for start, part in parts]
        whole = np.full(np.max(ends, axis=0), np.nan, dtype=np.float32)
        for start, part in parts:
            assert part.dtype == np.float32
            box = tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))
            assert np.isnan(whole[box]).all(), f"{name} is there twice"
            whole[box] = part
        assert not np.isnan(whole).any(), f"{name} has a gap"
        tensors[name] = whole
    return tensors


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor and of the trainer's state, less where it was saved."""
    state = json.loads((checkpoint / "trainer.json").read_text())
    del state["environment"]
    parts = {name: value.tobytes() for name, value in assembled(checkpoint).items()}
    parts["trainer.json"] = json.dumps(state, sort_keys=True).encode()
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


@pytest.fixture(scope="module")
def unmoved(launcher: Launcher, toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stays in the first layout and is saved one step before its end."""
    run_dir = tmp_path_factory.mktemp("unmoved") / "run"
    train(
        launcher,
        toy_tokens,
        run_dir,
        FIRST,
        f"{TRAININGS}:with_everything",
        train__steps=SAVED + 1,
        checkpoint__interval=SAVED,
    )
    return run_dir


@pytest.mark.slow
def test_every_tensor_keeps_its_bits_from_layout_to_layout(
    launcher: Launcher, unmoved: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """Round the layouts and back to the first; each also trains a step from what it has read."""
    checkpoint = unmoved / f"step-{SAVED:08d}"
    expected = digests(checkpoint)
    kinds = ("model", "optimizer.first_moment", "optimizer.second_moment")
    assert len(expected) == 3 * len(CheckpointWeights(checkpoint)) + 2
    assert all(f"{kind}.blocks.4.fc2.weight" in expected for kind in kinds)
    state = json.loads((checkpoint / "trainer.json").read_text())
    assert state["loss_scale"] == {"value": 2048.0, "good_steps": 1.0}
    assert state["optimizer_updates"] == SAVED
    losses = {FIRST: curve(unmoved)[SAVED + 1, "train"]}
    for number, layout in enumerate((*OTHERS, FIRST)):
        run_dir = tmp_path / f"run-{number}"
        train(
            launcher,
            toy_tokens,
            run_dir,
            layout,
            f"{TRAININGS}:with_everything",
            train__steps=SAVED + 1,
            checkpoint__resume=checkpoint,
            checkpoint__asynchronous="true",
        )
        last, checkpoint = find_checkpoints(run_dir)
        assert digests(checkpoint) == expected, layout
        after = digests(last)
        assert {name for name in expected if after[name] == expected[name]} == {"fp8.amax_history"}
        losses[layout] = curve(run_dir)[SAVED + 1, "train"]
    for layout, (loss, norm) in losses.items():
        assert loss == pytest.approx(losses[FIRST][0], rel=1e-6), layout
        assert norm == pytest.approx(losses[FIRST][1], rel=1e-4), layout


@pytest.mark.parametrize("layout", ["zbv 2 x tensor 2", "data 2 x tensor 2"])
def test_weights_are_read_without_the_processes_that_wrote_them(
    launcher: Launcher,
    toy_tokens: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """By our reader, inspect, convert and generate, from shards cut both ways."""
    from tools.cli import main

    run_dir = tmp_path / "run"
    train(launcher, toy_tokens, run_dir, layout, "megaphi.train:main", train__steps=1)
    expected = assembled(find_checkpoints(run_dir)[0])
    weights = CheckpointWeights(find_checkpoints(run_dir)[0])
    assert {f"model.{name}" for name in weights} == {n for n in expected if n.startswith("model.")}
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[f"model.{name}"])
    assert main(["inspect", str(run_dir)]) == 0
    assert main(["convert", "to-hf", str(run_dir), str(tmp_path / "hf"), "--verify"]) == 0
    models = [
        load_model(model, device="cpu", dtype=torch.float32).model
        for model in (run_dir, tmp_path / "hf")
    ]
    first, second = (generate(model, [[5, 8, 11]], max_new_tokens=8) for model in models)
    assert first == second


def test_a_run_may_change_its_layout_on_the_way(
    launcher: Launcher, unmoved: Path, toy_tokens: Path, tmp_path: Path
) -> None:
    """The same run directory, the newest checkpoint, and the data where they were left."""
    run_dir = tmp_path / "run"
    for steps, layout in ((2, "tensor 2 x context 2"), (4, "zbv 2 x tensor 2")):
        options = {"train__steps": steps}
        printed = train(launcher, toy_tokens, run_dir, layout, "megaphi.train:main", **options)
        assert ("resuming from" in printed) == (steps == 4)
    a, b = curve(unmoved), curve(run_dir)
    for step in range(1, 5):
        assert b[step, "train"] == pytest.approx(a[step, "train"], rel=1e-5)


def resume(launcher: Launcher, tokens: Path, run_dir: Path, entry: str) -> tuple[list[int], str]:
    """Train on from a checkpoint on two processes; exit statuses and output."""
    log = run_dir.parent / f"{entry}.log"
    options = toy_options(tokens, run_dir, train__steps=12, data__planned_samples=160)
    statuses = launcher.train(options, 2, log, f"{TRAININGS}:{entry}")
    return statuses, log.read_text()


@pytest.fixture
def saved(toy_tokens: Path, tmp_path: Path, train_here: Callable[[list[str]], Any]) -> Path:
    """A run of ten steps."""
    run_dir = tmp_path / "run"
    train_here(toy_options(toy_tokens, run_dir, train__steps=10, data__planned_samples=160))
    return run_dir


def test_main_alone_decides_what_is_loaded(
    launcher: Launcher, saved: Path, toy_tokens: Path
) -> None:
    """Another host may see a directory late; were it to decide, it would start anew."""
    statuses, printed = resume(launcher, toy_tokens, saved, "with_another_view_on_rank_1")
    assert statuses == [0, 0], printed
    assert f"resuming from {saved}/step-00000010" in printed


def test_a_checkpoint_that_main_finds_sound_is_not_set_aside(
    launcher: Launcher, saved: Path, toy_tokens: Path
) -> None:
    before = sorted(path.name for path in saved.iterdir())
    statuses, printed = resume(launcher, toy_tokens, saved, "with_unreadable_files_on_rank_1")
    assert statuses == [1, 1]
    assert "a file is missing; but process 0 finds this checkpoint sound" in printed
    assert sorted(path.name for path in saved.iterdir()) == before
