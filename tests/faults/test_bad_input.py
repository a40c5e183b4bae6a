"""What a user gets wrong, or a disk breaks, ends in one clear line, and nothing is lost."""

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaphi.config import Recipe
from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.data.sidecar import TokenFileInfo, write_info, written_facts
from megaphi.errors import RunError, run_main
from megaphi.formats.manifest import CheckpointError, find_checkpoints
from megaphi.metrics.logger import keep_metrics_until, last_step, metric_rows
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.train import main
from megaphi.training.trainer import Trainer
from tests.helpers import before_tensor_writes, curve, metrics, toy_options, write_toy_tokens
from tests.layouts import Launcher

Train = Callable[[list[str]], Recipe]


def fails(
    options: list[str], status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run the command in this process and check its status and its one line."""
    capsys.readouterr()
    assert run_main(main, options) == status
    lines = [li for li in capsys.readouterr().err.splitlines() if li.startswith("megaphi: error")]
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


def test_missing_and_truncated_token_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = toy_options(tmp_path / "nowhere", tmp_path / "run")
    fails(missing, 2, ["nowhere", "no such token file"], capsys)
    prefix = write_toy_tokens(tmp_path / "cut")
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(content[:-10])
    fails(toy_options(prefix, tmp_path / "run"), 1, ["cut.bin"], capsys)
    assert not (tmp_path / "run").exists()


def test_wrong_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_toy_tokens(tmp_path / "wide", vocab_size=900)
    options = toy_options(prefix, tmp_path / "run", data__split="100,0,0")
    options = [o for o in options if "data.split" not in o]
    fails(options, 1, ["outside the model's vocabulary of 512"], capsys)


def described_tokens(prefix: Path, tokenizer: str, vocab_size: int) -> Path:
    """A token file with a sidecar that names its tokenizer."""
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for start in range(50):
            writer.add_document(list(range(start, start + 100)))
    info = TokenFileInfo(
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer * 8,
        vocab_size=vocab_size,
        eod_id=0,
        recipe={},
        **written_facts(writer),
    )
    write_info(prefix, info)
    return prefix


def test_tokenizer_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = described_tokens(tmp_path / "wide", "a", 900)
    fails(toy_options(wide, tmp_path / "run"), 2, ["900 ids", "model.vocab_size"], capsys)
    first = described_tokens(tmp_path / "first", "b", 300)
    second = described_tokens(tmp_path / "second", "c", 300)
    options = [o for o in toy_options(first, tmp_path / "run") if "split" not in o]
    words = ["different tokenizers", "first", "second"]
    fails([*options, f"--data.validation={second}"], 2, words, capsys)
    assert run_main(main, [*options, "--train.steps=1"]) == 0
    # another token file under the same name
    content = first.with_suffix(".bin").read_bytes()
    first.with_suffix(".bin").write_bytes(content + content)
    fails([*options, "--train.steps=1"], 1, ["first.bin"], capsys)


def test_empty_and_short_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "short", np.dtype(np.uint16)) as writer:
        writer.add_document([1, 2, 3])
    options = [o for o in toy_options(tmp_path / "short", tmp_path / "run") if "split" not in o]
    fails(options, 2, ["short", "3"], capsys)


def test_batch_that_does_not_divide_over_processes(
    launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    options = toy_options(toy_tokens, tmp_path / "run", train__micro_batch_size=8)
    assert launcher.train(options, 2, tmp_path / "log") == [2, 2]
    said = (tmp_path / "log").read_text()
    assert said.count("train.global_batch_size=8 is not a multiple of") == 2


@pytest.fixture(scope="module")
def trained(toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with checkpoints at 15 and 20."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    recipe = load_recipe(toy_options(toy_tokens, run_dir))
    with processes() as mesh:
        Trainer(recipe, mesh).run()
    assert [p.name for p in find_checkpoints(run_dir)] == ["step-00000020", "step-00000015"]
    return run_dir


@pytest.fixture
def finished(trained: Path, toy_tokens: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """Options and directory of a copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return toy_options(toy_tokens, tmp_path / "run"), tmp_path / "run"


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(
    finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one file of each kind; test_bit_flips has the others."""
    options, run_dir = finished
    pristine, expected = tmp_path / "pristine", curve(run_dir)
    shutil.copytree(run_dir, pristine)
    seed = random.SystemRandom().randrange(1000)
    print(f"seed {seed}")
    generator = random.Random(seed)
    (tensors,) = (pristine / "step-00000020").glob("*.safetensors")
    for name in (tensors.name, "trainer.json", "manifest.json"):
        shutil.rmtree(run_dir)
        shutil.copytree(pristine, run_dir)
        path = run_dir / "step-00000020" / name
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        capsys.readouterr()
        assert run_main(main, options) == 0
        output = capsys.readouterr()
        assert f"step-00000020/{name}" in output.err
        assert "set aside as" in output.err
        assert "resuming from" in output.out
        assert "step-00000015" in output.out
        assert (run_dir / "step-00000020.corrupt-1" / name).read_bytes() == content
        assert curve(run_dir) == expected


def test_no_valid_checkpoint_never_means_random_weights(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options, run_dir = finished
    for path in find_checkpoints(run_dir):
        (path / "model.json").unlink()
    fails(options, 1, ["refusing to start from random weights"], capsys)
    # and not at the second try either, now that they are set aside
    fails(options, 1, ["refusing to start from random weights"], capsys)
    assert len(list(run_dir.glob("*.corrupt-1"))) == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"step-00000001\n", b"../../x\n"])
def test_the_latest_file_is_only_a_hint(
    finished: tuple[list[str], Path], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    options, run_dir = finished
    (run_dir / "latest").write_bytes(content)
    assert run_main(main, options) == 0
    assert "step-00000020" in capsys.readouterr().out


def test_resume_refuses_what_would_change_the_run(
    finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, run_dir = finished
    longer = [*options, "--train.steps=40"]
    fails(longer, 2, ["order of the data", "data.planned_samples=160"], capsys)
    fails([*options, "--train.seed=5"], 2, ["train.seed was 1234, is 5"], capsys)
    fails([*options, "--model.num_layers=3"], 2, ["model.num_layers was 2, is 3"], capsys)
    fails([*options, "--checkpoint.resume=never"], 2, ["already has checkpoints"], capsys)
    fails([*options, "--checkpoint.resume=/nowhere"], 2, ["/nowhere", "no such"], capsys)
    other = write_toy_tokens(tmp_path / "other", documents=201)
    fails([*options, f"--data.train={other}"], 2, ["content of the token files"], capsys)
    assert len(find_checkpoints(run_dir)) == 2
    assert run_main(main, [*longer, "--data.planned_samples=160"]) == 0
    steps = [row["step"] for row in metrics(run_dir) if "loss" in row]
    assert steps == list(range(1, 41))


def test_two_runs_cannot_share_a_directory(
    toy_tokens: Path, tmp_path: Path, launcher: Launcher
) -> None:
    """Also by another name of it; as a wrong call, which no launcher starts again."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    recipe = load_recipe(toy_options(toy_tokens, tmp_path / "run"))
    with processes() as mesh:
        first = Trainer(recipe, mesh)
        there = sorted(path.name for path in (tmp_path / "run").iterdir())
        for name in ("run", "link"):
            options = toy_options(toy_tokens, tmp_path / name)
            log = tmp_path / f"{name}.log"
            assert launcher.train(options, 1, log) == [2], log.read_text()
            assert f"{tmp_path / name}: another process is training into it" in log.read_text()
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == there
        first.checkpoints.close()
        first.watchdog.close()
    assert launcher.train(options, 1, log) == [0], log.read_text()
    assert find_checkpoints(tmp_path / "run")[0].name == "step-00000020"


def test_lines_of_the_metrics_that_are_no_rows(tmp_path: Path) -> None:
    """A line torn by a kill, a block that a disk lost, and what somebody wrote by hand."""
    path = tmp_path / "metrics.jsonl"
    row = b'{"step": 1, "loss": 2.0}'
    strange = [b"5", b"[1]", b'{"loss": 1.0}', b'{"step": null}', b"\xff\xfe", bytes(900), b""]
    path.write_bytes(b"\n".join([*strange, row, b'{"step": 2, "lo']))
    assert list(metric_rows(path)) == [(row, {"step": 1, "loss": 2.0})]
    assert last_step(tmp_path) == 1
    keep_metrics_until(path, 1)
    assert path.read_bytes() == row + b"\n"


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_a_run_directory_that_is_none(
    what: str, toy_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    if what == "file":
        run_dir.write_text("of somebody")
    else:
        run_dir.symlink_to(tmp_path / "gone")
    fails(toy_options(toy_tokens, run_dir), 2, [str(run_dir), "train.run_dir"], capsys)
    assert not (tmp_path / "gone").exists()
    assert what != "file" or run_dir.read_text() == "of somebody"


def test_a_file_system_without_locks_is_said(
    toy_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_here: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As Lustre is by default."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    train_here(toy_options(toy_tokens, tmp_path / "run", train__steps=1))
    assert "has no locks ([Errno 38] Function not implemented)" in capsys.readouterr().err
    assert find_checkpoints(tmp_path / "run")[0].name == "step-00000001"


def test_non_finite_steps_change_nothing_and_stop_the_run(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    """A learning rate that blows the weights up: every later step is skipped, then it stops."""
    options = toy_options(
        toy_tokens,
        tmp_path / "run",
        optimizer__learning_rate=1e36,
        schedule__warmup_steps=0,
        optimizer__weight_decay=0,
        train__max_nonfinite_steps=3,
        checkpoint__interval=1,
    )
    with pytest.raises(RunError, match="3 steps"):
        train_here(options)
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss"] is not None
    assert [row["grad_norm"] for row in rows if "loss" in row][-3:] == [None] * 3


def test_disk_full_is_named_and_older_checkpoints_stay(
    toy_tokens: Path, tmp_path: Path, train_here: Train
) -> None:
    calls = itertools.count()

    def write(_: str) -> None:
        if next(calls) > 0:
            raise OSError(28, "No space left on device")

    with (
        before_tensor_writes(write),
        pytest.raises(CheckpointError, match="No space left on device"),
    ):
        train_here(toy_options(toy_tokens, tmp_path / "run"))
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-00000005"]
    assert not list((tmp_path / "run").glob(".step-*"))
    train_here(toy_options(toy_tokens, tmp_path / "run"))
    assert find_checkpoints(tmp_path / "run")[0].name == "step-00000020"
