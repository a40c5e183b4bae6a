"""`megaphi generate`: lists of prompts, stop texts, streams, and readers that go away."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megaphi.config import Model
from megaphi.formats.weights import load_model, write_weights_checkpoint
from megaphi.generate import generate
from megaphi.model.phi import Phi
from tests.helpers import child_environment, write_byte_tokenizer
from tools.cli import main

MODEL = Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=300, max_sequence_length=96)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, 256 the end of a text."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Random weights whose next token depends on the text."""
    generator = torch.Generator().manual_seed(1)
    weights = [
        (name, torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in Phi(MODEL).named_parameters()
    ]
    folder = tmp_path_factory.mktemp("models") / "model"
    write_weights_checkpoint(folder, MODEL, weights, tokenizer_dir, {})
    return folder


def run(capsys: Any, model_dir: Path, *options: object, status: int = 0) -> str:
    words = ["generate", str(model_dir), "--device", "cpu", *map(str, options)]
    assert main(words) == status
    captured = capsys.readouterr()
    return str(captured.err if status else captured.out)


def greedy(model_dir: Path, tokenizer_dir: Path, prompt: str, count: int) -> tuple[list[int], str]:
    """What the library gives for one prompt alone."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    loaded = load_model(model_dir, device="cpu", dtype=torch.float32)
    ids = tokenizer.encode(prompt).ids
    (tokens,) = generate(loaded.model, [ids], max_new_tokens=count, eos_id=256)
    return tokens, tokenizer.decode(tokens, skip_special_tokens=False)


def test_a_list_of_prompts_gives_a_line_each_in_order(
    tmp_path: Path, model_dir: Path, tokenizer_dir: Path, capsys: Any
) -> None:
    prompts = ["def f():", "x", "import os\nimport sys", "ü = 1", "#"]
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    outputs = [
        run(capsys, model_dir, "--prompt-file", path, "--max-new-tokens", 15, "--batch-size", size)
        for size in (2, 16)
    ]
    assert outputs[0] == outputs[1]
    found = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4]
    for row, prompt in zip(found, prompts, strict=True):
        tokens, text = greedy(model_dir, tokenizer_dir, prompt, 15)
        assert (row["completion"], row["completion_tokens"]) == (text, len(tokens))
        assert row["prompt_tokens"] == len(prompt.encode())

    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "prompts.jsonl: line 2 must be" in run(
        capsys, model_dir, "--prompt-file", path, status=2
    )
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b" * 90}) + "\n")
    words = ["--prompt-file", path, "--max-new-tokens", 7]
    message = run(capsys, model_dir, *words, status=2)
    assert "prompts.jsonl: line 2: the prompt has 90 tokens" in message


def test_a_stop_text_ends_the_completion_before_it(
    model_dir: Path, tokenizer_dir: Path, capsys: Any
) -> None:
    prompt = "class A:"
    _, free = greedy(model_dir, tokenizer_dir, prompt, 40)
    stop = free[20:23]
    expected = free[: free.index(stop)]
    assert len(expected) > 0
    words = ["--prompt", prompt, "--max-new-tokens", 40, "--stop", "never there", "--stop", stop]
    (line,) = run(capsys, model_dir, *words, "--json").splitlines()
    assert json.loads(line)["completion"] == expected
    assert json.loads(line)["finish_reason"] == "stop"
    assert run(capsys, model_dir, *words) == prompt + expected + "\n"
    assert run(capsys, model_dir, *words, "--stream") == prompt + expected + "\n"


def test_samples_differ_and_do_not_depend_on_the_batch(model_dir: Path, capsys: Any) -> None:
    words = ["--prompt", "x = ", "--max-new-tokens", 12, "--samples", 5, "--temperature", 1]
    found = [
        [
            json.loads(line)["completion"]
            for line in run(capsys, model_dir, *words, "--json", "--batch-size", n).splitlines()
        ]
        for n in (2, 5)
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == 5
    assert run(capsys, model_dir, *words).count("--- sample ") == 5


def test_a_stream_comes_in_pieces(model_dir: Path) -> None:
    """And each piece is whole characters, although a token is a byte."""
    words = ["generate", str(model_dir), "--prompt", "abc", "--max-new-tokens", "60", "--stream"]
    words += ["--device", "cpu"]
    # the pieces are counted on their way to the pipe, which would join them
    script = (
        "import sys, tools.cli\n"
        "write = sys.stdout.write\n"
        "pieces = []\n"
        "sys.stdout.write = lambda text: pieces.append(text) or write(text)\n"
        "status = tools.cli.main(sys.argv[1:])\n"
        "print(len([piece for piece in pieces if piece]), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env=child_environment(),
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith(b"abc")
    assert int(done.stderr.split()[-1]) > 10
    done.stdout.decode("utf-8")  # no half character was written


def test_a_reader_that_goes_away_is_no_error(model_dir: Path) -> None:
    words = [sys.executable, "-m", "megaphi", "generate", str(model_dir), "--device", "cpu"]
    words += ["--prompt", "abc", "--max-new-tokens", "80", "--stream"]
    with subprocess.Popen(
        words, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()  # the first write finds nobody
        message = child.stderr.read()
        assert child.wait(120) == 0
    assert message == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "2"], "--samples 2 at temperature 0"),
        (["--samples", "0"], "--samples must be above 0"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--stop", ""], "--stop must not be empty"),
        (["--stream", "--json"], "--stream is for one completion"),
        (["--stream", "--samples", "2", "--temperature", "1"], "--stream is for one completion"),
    ],
)
def test_calls_that_make_no_sense(
    model_dir: Path, capsys: Any, options: list[str], message: str
) -> None:
    assert message in run(capsys, model_dir, "--prompt", "x", *options, status=2)
