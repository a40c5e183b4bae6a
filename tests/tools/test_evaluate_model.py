"""`megaphi evaluate MODEL`: batches, other architectures, every checkpoint of a run."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megaphi.config import Model, Recipe
from megaphi.formats.weights import load_model, write_weights_checkpoint
from megaphi.generate import generate
from megaphi.model.phi import Phi
from tests.helpers import child_environment, toy_options, write_byte_tokenizer
from tests.isolation import needs_sandbox
from tools.cli import main
from tools.evaluation.completions import truncate
from tools.evaluation.suites import HUMANEVAL_STOPS

pytestmark = needs_sandbox

PROMPTS = {"toy/1": "def f():\n", "toy/2": "def longer(a, b):\n    ", "toy/3": "def g(x):\n" * 6}
MODEL = Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=300, max_sequence_length=64)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "toy.jsonl"
    test = "def check(candidate):\n    assert candidate() == 1\n"
    rows = [
        {"task_id": task_id, "prompt": prompt, "entry_point": "f", "test": test}
        for task_id, prompt in PROMPTS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, 256 the end of a text."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_phi(config: Model) -> list[tuple[str, torch.Tensor]]:
    """Weights whose next token depends on the text."""
    generator = torch.Generator().manual_seed(0)
    return [
        (name, torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in Phi(config).named_parameters()
    ]


def row_seed(task_id: str, sample: int) -> int:
    """As documented: the first 7 bytes of SHA-256 over seed/problem/sample."""
    digest = hashlib.sha256(f"5/{task_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def test_samples_are_those_of_one_at_a_time(
    tmp_path: Path, suite: Path, tokenizer_dir: Path, capsys: Any
) -> None:
    """Batched, killed and continued: the completions that the library gives for each alone."""
    write_weights_checkpoint(tmp_path / "model", MODEL, random_phi(MODEL), tokenizer_dir, {})
    out = tmp_path / "out"
    command = ["evaluate", str(tmp_path / "model"), "--suite", str(suite), "--out", str(out)]
    command += ["--samples", "4", "--temperature", "0.7", "--top-p", "0.9", "--seed", "5"]
    command += ["--max-new-tokens", "20", "--batch-size", "5", "--device", "cpu", "--json"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["programs"] == 12

    loaded = load_model(tmp_path / "model", device="cpu", dtype=torch.float32)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    expected = {}
    for task_id, prompt in PROMPTS.items():
        ids = tokenizer.encode(prompt).ids
        for sample in range(4):
            (tokens,) = generate(
                loaded.model,
                [ids],
                max_new_tokens=min(20, 64 - len(ids)),  # the third has room for 4 only
                temperature=0.7,
                top_p=0.9,
                seed=[row_seed(task_id, sample)],
                eos_id=256,
            )
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            expected[task_id, sample] = truncate(text, HUMANEVAL_STOPS)
    first = read_rows(out / "completions.jsonl")
    assert {(row["task_id"], row["sample"]): row["completion"] for row in first} == expected
    assert len(set(expected.values())) > 8

    lines = (out / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "completions.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])
    (out / "results.jsonl").unlink()
    assert main(command) == 0
    assert (out / "completions.jsonl").read_bytes().startswith(b"".join(lines[:7]))
    assert sorted(read_rows(out / "completions.jsonl"), key=str) == sorted(first, key=str)
    assert main([*command, "--seed", "6"]) == 2
    assert "begun with seed 5, now it is 6" in capsys.readouterr().err


def test_other_architectures_run_through_transformers(
    tmp_path: Path, suite: Path, tokenizer_dir: Path, capsys: Any
) -> None:
    """Greedy, left-padded and in a batch, against one pass over the whole text for each token."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=80, n_embd=32, n_layer=2, n_head=2, bos_token_id=256,
        eos_token_id=256, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    command = ["evaluate", str(tmp_path / "gpt2"), "--suite", str(suite), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "12", "--out", str(tmp_path / "out")]) == 0
    expected = {}
    for task_id, prompt in PROMPTS.items():
        ids = tokenizer(prompt).input_ids
        new: list[int] = []
        while len(new) < 12:
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == 256:
                new.pop()
                break
        text = tokenizer.decode(new, clean_up_tokenization_spaces=False)
        expected[task_id] = truncate(text, HUMANEVAL_STOPS)
    rows = read_rows(tmp_path / "out/completions.jsonl")
    assert {row["task_id"]: row["completion"] for row in rows} == expected
    assert any(expected.values())


def test_every_checkpoint_is_drawn_over_tokens(
    tmp_path: Path,
    suite: Path,
    tokenizer_dir: Path,
    toy_tokens: Path,
    train_here: Callable[[list[str]], Recipe],
    capsys: Any,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, out = tmp_path / "run", tmp_path / "out"
    train_here(toy_options(toy_tokens, run_dir, train__steps=10))
    command = [
        "evaluate",
        str(run_dir),
        "--suite",
        str(suite),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    command += ["--tokenizer", str(tokenizer_dir), "--max-new-tokens", "4", "--json"]
    command += ["--all-checkpoints", "--tensorboard"]
    capsys.readouterr()
    for _ in range(2):  # the second time costs nothing and draws the same
        assert main(command) == 0
        summary = json.loads(capsys.readouterr().out)
        tokens = [5 * 8 * 32, 10 * 8 * 32]
        assert [point["tokens"] for point in summary["checkpoints"]] == tokens
        board = EventAccumulator(str(run_dir / "tensorboard" / "evaluation-toy"))
        board.Reload()
        points = board.Scalars("evaluation/toy/pass@1")
        assert [(point.step, point.value) for point in points] == [(step, 0.0) for step in tokens]
    assert len(read_rows(out / "step-00000005" / "results.jsonl")) == 3


def points_of(run_dir: Path) -> list[tuple[int, float]]:
    """The curve that a run's TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard" / "evaluation-toy"))
    board.Reload()
    return [(point.step, point.value) for point in board.Scalars("evaluation/toy/pass@1")]


def follow(run_dir: Path, suite: Path, tokenizer_dir: Path, new_tokens: int) -> list[str]:
    """The words of a follower."""
    command = ["evaluate", str(run_dir), "--suite", str(suite), "--device", "cpu", "--follow"]
    return [*command, "--tokenizer", str(tokenizer_dir), "--max-new-tokens", str(new_tokens)]


def test_a_follower_scores_checkpoints_as_they_appear_and_survives_its_death(
    tmp_path: Path,
    suite: Path,
    tokenizer_dir: Path,
    toy_tokens: Path,
    train_here: Callable[[list[str]], Recipe],
    capsys: Any,
) -> None:
    """Started before the run has a directory, killed after the first, started again."""
    trained, run_dir = tmp_path / "trained", tmp_path / "run"
    train_here(toy_options(toy_tokens, trained, train__steps=15, checkpoint__keep=5))
    command = [*follow(run_dir, suite, tokenizer_dir, 4), "--workers", "1"]
    command += ["--poll-seconds", "0.1", "--json"]
    out = run_dir / "evaluations" / "toy"

    def publish(name: str) -> None:
        shutil.copytree(trained / name, run_dir / f".{name}")
        (run_dir / f".{name}").rename(run_dir / name)

    with subprocess.Popen(
        [sys.executable, "-m", "megaphi", *command], env=child_environment()
    ) as follower:
        run_dir.mkdir()
        publish("step-00000005")
        limit = time.monotonic() + 120
        while not (out / "scores.jsonl").exists() and time.monotonic() < limit:
            assert follower.poll() is None
            time.sleep(0.05)
        follower.kill()
    first = (out / "step-00000005" / "completions.jsonl").read_bytes()
    assert [row["tokens"] for row in read_rows(out / "scores.jsonl")] == [5 * 8 * 32]

    # it dies: nothing changes any more, and who follows it says so
    (run_dir / "metrics.jsonl").write_text("")
    assert main([*command, "--patience-seconds", "0.5"]) == 1
    assert "nothing has changed in it for 0.5 s" in capsys.readouterr().err

    # the training goes on, removes its oldest checkpoint, and leaves a damaged one
    publish("step-00000010")
    publish("step-00000015")
    shutil.rmtree(run_dir / "step-00000005")
    (run_dir / "step-00000010" / "trainer.json").write_text("{}")
    capsys.readouterr()
    assert main(command) == 0  # the last checkpoint ends it
    captured = capsys.readouterr()
    assert captured.err.count("skipping a checkpoint") == 1
    tokens = [5 * 8 * 32, 15 * 8 * 32]
    assert [point["tokens"] for point in json.loads(captured.out)["checkpoints"]] == tokens
    assert [row["tokens"] for row in read_rows(out / "scores.jsonl")] == tokens
    assert points_of(run_dir) == [(count, 0.0) for count in tokens]
    assert (out / "step-00000005" / "completions.jsonl").read_bytes() == first


def test_a_follower_may_take_some_steps_only(
    tmp_path: Path,
    suite: Path,
    tokenizer_dir: Path,
    toy_tokens: Path,
    train_here: Callable[[list[str]], Recipe],
    capsys: Any,
) -> None:
    run_dir = tmp_path / "run"
    train_here(toy_options(toy_tokens, run_dir, train__steps=15, checkpoint__keep=5))
    command = [*follow(run_dir, suite, tokenizer_dir, 2), "--every-steps", "10"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert points_of(run_dir) == [(step * 8 * 32, 0.0) for step in (10, 15)]
    assert main([*command, "--every-steps", "0"]) == 2
    assert "--every-steps must be above 0" in capsys.readouterr().err


def test_a_follower_ends_with_the_run_and_not_with_a_checkpoints_recipe(
    tmp_path: Path,
    suite: Path,
    tokenizer_dir: Path,
    toy_tokens: Path,
    train_here: Callable[[list[str]], Recipe],
    capsys: Any,
) -> None:
    """A run that got more steps is followed past its first end; a damaged last one is an end."""
    run_dir = tmp_path / "run"
    options = {"data__planned_samples": 160, "schedule__decay_steps": 20, "checkpoint__keep": 5}
    for steps in (10, 15):
        train_here(toy_options(toy_tokens, run_dir, train__steps=steps, **options))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("steps: 15", "steps: 20", 1))
    command = [*follow(run_dir, suite, tokenizer_dir, 2), "--workers", "1"]
    command += ["--poll-seconds", "0.1", "--patience-seconds", "1"]
    assert main(command) == 1
    assert "nothing has changed" in capsys.readouterr().err
    train_here(toy_options(toy_tokens, run_dir, train__steps=20, **options))
    with (run_dir / "step-00000020" / "trainer.json").open("a") as file:
        file.write(" ")
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "skipping a checkpoint" in captured.err
    assert [step for step, _ in points_of(run_dir)] == [s * 8 * 32 for s in (5, 10, 15)]
