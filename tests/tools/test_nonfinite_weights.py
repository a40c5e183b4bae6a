"""Weights that are NaN or infinite: one line from every verb that reads a model, and no answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaphi.config import Model
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import parameter_shapes
from tests.helpers import write_byte_tokenizer
from tools.cli import main

CONFIG = Model(num_layers=1, hidden_size=16, num_heads=2, vocab_size=320, max_sequence_length=64)
ROW = {
    "task_id": "t/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate() == 3\n",
}


def make_checkpoint(directory: Path, value: float) -> Path:
    """A checkpoint in which one number of the head is `value`."""
    random = torch.Generator().manual_seed(0)
    weights = [(n, torch.randn(s, generator=random)) for n, s in parameter_shapes(CONFIG).items()]
    dict(weights)["head.weight"][3, 5] = value
    tokenizer = directory.with_name("bytes")
    tokenizer.mkdir()
    write_weights_checkpoint(
        directory, CONFIG, weights, write_byte_tokenizer(tokenizer), {"kind": "weights"}
    )
    return directory


def said(capsys: Any, *words: object) -> str:
    """The one line of a call that fails."""
    assert main([str(word) for word in words]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return str(captured.err)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_that_is_not_finite(tmp_path: Path, capsys: Any, value: float) -> None:
    model = make_checkpoint(tmp_path / "model", value)
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps(ROW) + "\n")
    calls = (
        ["generate", model, "--prompt", "a", "--max-new-tokens", "2"],
        ["convert", "to-hf", model, tmp_path / "hf"],
        ["convert", "to-gguf", model, tmp_path / "x.gguf", "--type", "F32"],
        ["inspect", model, "--deep"],
    )
    for call in calls:
        line = said(capsys, *call)
        assert "head.weight" in line
        assert "not finite" in line
    assert not (tmp_path / "hf").exists()
    assert main(["inspect", str(model)]) == 0  # which reads no tensor


def test_evaluate_gives_no_score(tmp_path: Path, capsys: Any) -> None:
    from tests.isolation import NO_SANDBOX

    model = make_checkpoint(tmp_path / "model", float("nan"))
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps(ROW) + "\n")
    words = ["evaluate", model, "--suite", suite, "--out", tmp_path / "out", "--device", "cpu"]
    line = said(capsys, *words, *(["--unsafe-no-sandbox"] if NO_SANDBOX else []))
    assert "not finite" in line
    assert not (tmp_path / "out/summary.json").exists()


def test_a_hugging_face_directory_that_is_not_finite(tmp_path: Path, capsys: Any) -> None:
    model = make_checkpoint(tmp_path / "model", 1.0)
    hf = tmp_path / "hf"
    assert main(["convert", "to-hf", str(model), str(hf)]) == 0
    assert main(["inspect", str(hf), "--deep"]) == 0
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.bias"][7] = float("nan")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    for call in (
        ["convert", "from-hf", hf, tmp_path / "back"],
        ["generate", hf, "--prompt", "a", "--max-new-tokens", "2"],
        ["inspect", hf, "--deep"],
    ):
        line = said(capsys, *call)
        assert "lm_head.bias" in line
        assert "not finite" in line
    assert not (tmp_path / "back").exists()


def test_a_weight_that_a_format_cannot_hold(tmp_path: Path, capsys: Any) -> None:
    model = make_checkpoint(tmp_path / "model", 1e6)
    words = ["generate", str(model), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
    assert "head.weight is too large" in said(capsys, *words, "--dtype", "fp16")
    assert main([*words, "--dtype", "fp32"]) == 0
