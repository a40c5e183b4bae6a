"""Saving in the background: what is written, when, and what happens when it cannot be."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from megaphi.checkpoint import manager
from megaphi.config import Recipe
from megaphi.formats.manifest import CheckpointError, find_checkpoints, verify_checkpoint
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.training.trainer import Trainer
from tests.helpers import before_tensor_writes, curve, metrics, toy_options

TrainHere = Callable[[list[str]], Recipe]


@pytest.fixture
def trainer(toy_tokens: Path, tmp_path: Path) -> Iterator[Trainer]:
    """A run that saves in the background and has not begun."""
    options = toy_options(toy_tokens, tmp_path / "run", checkpoint__asynchronous="true")
    with processes() as mesh:
        trainer = Trainer(load_recipe(options), mesh)
        yield trainer
        trainer.checkpoints.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Nothing of a tensor file is written before this event."""
    gate = threading.Event()

    def wait(_: str) -> None:
        assert gate.wait(timeout=60)

    with before_tensor_writes(wait):
        yield gate
        gate.set()


class TorchWithoutMemory:
    """Stands in for the module `torch`; what it has, but no memory for new tensors."""

    def empty(self, *_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def written(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that one process wrote."""
    verify_checkpoint(checkpoint)
    files = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def values(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a checkpoint of the trainer holds."""
    tensors = trainer.state.tensors().items()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def overwrite(trainer: Trainer, value: float) -> None:
    """Fill every tensor with a number."""
    with torch.no_grad():
        for tensor in trainer.state.tensors().values():
            tensor.fill_(value)


def test_what_is_written_is_what_there_was(trainer: Trainer, gate: threading.Event) -> None:
    """Everything is overwritten before the first byte is on the disk."""
    expected = values(trainer)
    trainer.save()
    overwrite(trainer, 7.0)
    assert find_checkpoints(trainer.state.run_dir) == []
    gate.set()
    trainer.checkpoints.wait()
    (checkpoint,) = find_checkpoints(trainer.state.run_dir)
    assert_equal(written(checkpoint), expected)


def test_one_save_at_a_time_and_one_snapshot(
    trainer: Trainer,
    gate: threading.Event,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next save waits, says so once, and uses the same memory."""
    monkeypatch.setattr("megaphi.checkpoint.staging.torch", TorchWithoutMemory())
    for step in range(1, 4):
        trainer.state.step = step
        overwrite(trainer, float(step))
        # what the save before still has to write is let through only while this one waits for it
        threading.Timer(0.3, gate.set).start()
        trainer.save()
        gate.clear()
    gate.set()
    trainer.checkpoints.wait()
    newest, before = find_checkpoints(trainer.state.run_dir)
    assert (newest.name, before.name) == ("step-00000003", "step-00000002")
    for checkpoint, value in ((newest, 3.0), (before, 2.0)):
        assert all((tensor == value).all() for tensor in written(checkpoint).values())
    said = re.findall(r"the save of step (\d+) waited [\d.]+ s", capsys.readouterr().err)
    assert said == ["2"]


def test_files_are_those_of_a_save_that_training_waits_for(
    toy_tokens: Path, tmp_path: Path, train_here: TrainHere
) -> None:
    for asynchronous in ("true", "false"):
        train_here(
            toy_options(toy_tokens, tmp_path / asynchronous, checkpoint__asynchronous=asynchronous)
        )
    assert curve(tmp_path / "true") == curve(tmp_path / "false")
    pairs = [find_checkpoints(tmp_path / name) for name in ("true", "false")]
    assert [path.name for path in pairs[0]] == ["step-00000020", "step-00000015"]
    for first, second in zip(*pairs, strict=True):
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        for path in first.glob("*.safetensors"):
            assert path.stat().st_size == (second / path.name).stat().st_size
        assert_equal(written(first), written(second))
        assert (first / "trainer.json").read_text() == (second / "trainer.json").read_text()


@pytest.mark.parametrize("stage", ["write", "publish", "verify"])
def test_a_failed_save_stops_the_run_and_takes_nothing_with_it(
    stage: str,
    toy_tokens: Path,
    tmp_path: Path,
    train_here: TrainHere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third save fails: the next ends the run at the latest; `latest` and the older stay."""
    failed = False
    stack = contextlib.ExitStack()

    def fail_third(function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any) -> Any:
            nonlocal failed
            if not failed and "step-00000060" in str(arguments[0]):
                failed = True
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return failing

    if stage == "write":
        stack.enter_context(before_tensor_writes(fail_third(str)))
    elif stage == "publish":
        monkeypatch.setattr(manager, "publish_directory", fail_third(manager.publish_directory))
    else:
        monkeypatch.setattr(manager, "verify_files", fail_third(manager.verify_files))
    run_dir = tmp_path / "run"
    options = toy_options(
        toy_tokens, run_dir, train__steps=100, checkpoint__asynchronous="true",
        checkpoint__interval=20, train__global_batch_size=2, train__evaluation_interval=1000,
    )  # fmt: skip
    with stack, pytest.raises(CheckpointError, match="No space left on device"):
        train_here(options)
    last = metrics(run_dir)[-1]["step"]
    assert 60 <= last <= 80  # a slow disk: the next save waits for this one, and hears of it
    assert (run_dir / "latest").read_text() == "step-00000040\n"
    kept = find_checkpoints(run_dir)[1 if stage == "verify" else 0 :]
    assert [path.name for path in kept] == ["step-00000040", "step-00000020"]
    for path in kept:
        verify_checkpoint(path)
    monkeypatch.undo()
    train_here(options)
    assert metrics(run_dir)[-1]["step"] == 100


def test_the_last_save_is_complete_and_its_failure_is_the_runs(
    toy_tokens: Path, tmp_path: Path, train_here: TrainHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    options = toy_options(
        toy_tokens, tmp_path / "run", train__steps=3, checkpoint__asynchronous="true"
    )
    with monkeypatch.context() as patch:
        patch.setattr(manager, "publish_directory", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train_here(options)
    assert find_checkpoints(tmp_path / "run") == []
    train_here(options)
    verify_checkpoint(tmp_path / "run" / "step-00000003")


def test_a_run_that_fails_lets_its_save_finish(
    trainer: Trainer, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after the first save breaks while that is still being written."""
    train_step = trainer.train_step

    def breaking(loader: Any) -> Any:
        if trainer.state.step == 5:
            threading.Timer(0.3, gate.set).start()
            raise RuntimeError("out of order")
        return train_step(loader)

    monkeypatch.setattr(trainer, "train_step", breaking)
    with pytest.raises(RuntimeError, match="out of order"):
        trainer.run()
    verify_checkpoint(trainer.state.run_dir / "step-00000005")
    assert (trainer.state.run_dir / "latest").read_text() == "step-00000005\n"


def test_memory_that_is_not_there_is_one_clear_error(
    toy_tokens: Path, tmp_path: Path, train_here: TrainHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaphi.checkpoint.staging.torch", TorchWithoutMemory())
    options = toy_options(toy_tokens, tmp_path / "run", checkpoint__asynchronous="true")
    with pytest.raises(RuntimeError, match=r"checkpoint\.asynchronous=false"):
        train_here(options)
