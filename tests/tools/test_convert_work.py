"""Conversions that are killed, and the model card."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megaphi.config import Model
from megaphi.formats import weight_files
from megaphi.formats.weight_files import PendingTensor, write_safetensors
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import Phi
from tests.helpers import toy_options
from tools.cli import main

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=300, max_sequence_length=128)


def make_checkpoint(directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    state = {name: torch.randn(t.shape) for name, t in Phi(CONFIG).state_dict().items()}
    write_weights_checkpoint(directory, CONFIG, state.items(), None, {"step": seed})
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def killed_export(words: list[str]) -> None:
    """Run the command in a child that is killed in the middle of its third file."""
    child = os.fork()
    if child == 0:
        honest, count = weight_files.write_safetensors, 0

        def write(path: Path, tensors: dict, metadata: dict) -> object:
            nonlocal count
            count += 1
            if count == 3:
                path.write_bytes(b"half a file")
                os._exit(137)
            return honest(path, tensors, metadata)

        weight_files.write_safetensors = write  # type: ignore[assignment]
        main(words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137


def to_hf(source: Path, out: Path) -> list[str]:
    return ["convert", "to-hf", str(source), str(out), "--max-shard-size", "40KB", "--json"]


def converted(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_a_killed_export_leaves_nothing_that_looks_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = make_checkpoint(tmp_path / "model"), make_checkpoint(tmp_path / "other", 1)
    assert converted(to_hf(source, tmp_path / "undisturbed" / "hf"), capsys)["files"] > 3
    out = tmp_path / "hf"
    killed_export(to_hf(other, out))
    assert not out.exists()
    converted([*to_hf(source, out), "--verify"], capsys)
    assert tree(out) == tree(tmp_path / "undisturbed" / "hf")
    assert not (tmp_path / "hf.partial").exists()


def test_rounding_shows_in_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "model")
    words = [*to_hf(source, tmp_path / "hf"), "--verify", "--dtype", "bf16"]
    logits = converted(words, capsys)["logits"]
    assert 0 < logits["max_difference"] < 0.1 * logits["largest"]
    assert logits["positions"] == 32


def test_a_work_directory_that_is_not_ours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(tmp_path / "model")
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "thesis.txt").write_text("precious")
    assert main(to_hf(source, tmp_path / "hf")) == 2
    assert "holds thesis.txt; move it" in capsys.readouterr().err
    assert tree(tmp_path / "hf.partial") == {"thesis.txt": b"precious"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_the_librarys_byte_for_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"a": (3, 5), "b.\u00e9": (7,), "c": (1, 2, 3)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    pending = {
        name: PendingTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()
    }
    digest = write_safetensors(tmp_path / "ours", pending, {"format": "pt"})
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert (digest.bytes, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def summary(identity: str) -> dict:
    score = {"value": 0.5061, "low": 0.43, "high": 0.58, "problems": 164}
    return {
        "suite": "humaneval",
        "problems": 164,
        "pass@k": {"1": score},
        "model": "runs/phi",
        "weights_sha256": identity,
        "sampling": {"temperature": 0.2, "samples": 20},
    }


def test_card_of_a_trained_model(
    tmp_path: Path, toy_tokens: Path, train_here, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my-phi"
    train_here(toy_options(toy_tokens, run, train__steps=10))
    checkpoint = run / "step-00000010"
    identity = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    (run / "scores").mkdir()
    (run / "scores" / "summary.json").write_text(json.dumps(summary(identity)))
    (run / "of-another").mkdir()
    other = {**summary("f" * 64), "suite": "of another step"}
    (run / "of-another" / "summary.json").write_text(json.dumps(other))
    out = tmp_path / "hf"
    words = ["convert", "to-hf", str(run), str(out), "--license", "mit", "--json"]
    assert converted(words, capsys)["scores"] == 1
    card = (out / "README.md").read_text()
    head = card.split("---")[1]
    assert "license: mit" in head
    assert "library_name: transformers" in head
    for line in (
        "# my-phi",
        "| step | 10 |",
        # 10 steps of 8 samples of 32 tokens
        "| training tokens seen | 2,560 |",
        "| humaneval | pass@1 | 50.6% (43.0 to 58.0) | 164 | temperature 0.2, samples 20 |",
        f"| `{toy_tokens.name}` |",
        "learning_rate:",
        'from_pretrained("hf")',
        "vllm serve hf",
        "megaphi convert to-gguf hf model.gguf",
    ):
        assert line in card, line
    assert "of another step" not in card
    assert str(tmp_path) not in card
    # named results must be this model's
    named = ["--scores", str(run / "of-another")]
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf-2"), *named]) == 2
    assert "whose weights are not those" in capsys.readouterr().err


def test_card_leaves_the_licence_to_the_user(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model")
    assert main(["convert", "to-hf", str(source), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# license: choose one" in card.split("---")[1]
    assert "None were given" in card
    assert "## Training data" not in card
