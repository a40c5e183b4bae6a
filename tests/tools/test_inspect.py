"""`megaphi inspect` of each kind, against known values, whole and damaged."""

import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from megaphi.config import Model
from megaphi.data.indexed import IndexedDatasetWriter, token_file_paths
from megaphi.data.sidecar import TokenFileInfo, write_info
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import Phi
from tests.helpers import REPOSITORY, child_environment, metrics, toy_options
from tools.cli import main

EOD = 0
DOCUMENTS = [[5, 9, 3, EOD], [7, EOD], [], [1, 2, 3, 4, 5, 6]]
MODEL = Model(num_layers=1, hidden_size=16, num_heads=2, vocab_size=30, max_sequence_length=8)


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def describe(prefix: Path, vocab_size: int = 10) -> None:
    """Write the description of a finished token file, hashes and all."""
    paths = token_file_paths(prefix)
    with paths.idx.open("rb") as file:
        header = file.read(34)
    num_sequences = int.from_bytes(header[18:26], "little")
    num_documents = int.from_bytes(header[26:34], "little") - 1
    info = TokenFileInfo(
        tokenizer="toy",
        tokenizer_sha256="ab" * 32,
        vocab_size=vocab_size,
        eod_id=EOD,
        num_documents=num_documents,
        num_sequences=num_sequences,
        num_tokens=paths.bin.stat().st_size // 2,
        bin_sha256=hashlib.sha256(paths.bin.read_bytes()).hexdigest(),
        idx_sha256=hashlib.sha256(paths.idx.read_bytes()).hexdigest(),
        bin_bytes=paths.bin.stat().st_size,
        idx_bytes=paths.idx.stat().st_size,
        recipe={"made": "by hand"},
    )
    write_info(prefix, info)


def write_tokens(prefix: Path, documents: list[list[int]], described: bool = True) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids, [] if not ids else None)
    if described:
        describe(prefix)
    return prefix


def inspect(capsys: Any, target: Path | str, *options: str, status: int = 0) -> dict[str, Any]:
    """The JSON report; the exit status must be `status`."""
    assert main(["inspect", str(target), "--json", *options]) == status
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def damage(capsys: Any, target: Path, file: Path, *options: str) -> str:
    """What is said of a damaged target: the same on stderr and in the JSON, naming the file."""
    assert main(["inspect", str(target), "--json", *options]) == 1
    shown = capsys.readouterr()
    problem: str = json.loads(shown.out)["problem"]
    assert str(file) in problem
    assert shown.err == f"megaphi: error: {problem}\n"
    assert main(["inspect", str(target), *options]) == 1
    assert str(file) in capsys.readouterr().err
    return problem


# token files


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize("deep", [False, True])
def test_tokens(tmp_path: Path, capsys, suffix: str, deep: bool) -> None:
    prefix = write_tokens(tmp_path / "corpus.v1", DOCUMENTS)
    report = inspect(capsys, f"{prefix}{suffix}", *["--deep"] * deep)
    assert (report.pop("smallest_id", None), report.pop("largest_id", None)) == (
        (0, 9) if deep else (None, None)
    )
    assert report == {
        "kind": "tokens",
        "path": str(prefix),
        "dtype": "uint16",
        "documents": 4,
        "sequences": 3,
        "tokens": 12,
        "document_tokens": {"shortest": 0, "mean": 3.0, "longest": 6},
        "bin_bytes": 2 * 12,
        "idx_bytes": 34 + 12 * 3 + 8 * 5,
        "described_by_json": True,
        "tokenizer": "toy",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 10,
        "eod_id": EOD,
        "recipe": {"made": "by hand"},
        "documents_checked_for_eod": 3,
        "documents_ending_with_eod": 2,
        "verified": "hashes" if deep else "sizes",
    }


def test_a_document_of_several_sequences(tmp_path: Path, capsys) -> None:
    with IndexedDatasetWriter(tmp_path / "t", np.int32) as writer:
        writer.add_document([70_000, 1, 2], [1, 2])
        writer.add_document([3, 4, 5, 6], [4])
    report = inspect(capsys, tmp_path / "t", "--deep")
    assert (report["documents"], report["sequences"], report["dtype"]) == (2, 3, "int32")
    assert report["document_tokens"] == {"shortest": 3, "mean": 3.5, "longest": 4}
    assert (report["smallest_id"], report["largest_id"]) == (1, 70_000)
    assert report["described_by_json"] is False
    assert report["verified"] == "sizes"  # there is no hash to compare with


def test_ends_are_sampled_and_deep_looks_at_all(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tools.inspect.data.READ_TOKENS", 7)  # documents lie across blocks
    prefix = write_tokens(tmp_path / "t", [[1, EOD]] * 2999 + [[1, 2]])
    report = inspect(capsys, prefix)
    assert report["documents_checked_for_eod"] == 1000
    assert report["documents_ending_with_eod"] == 999  # first and last are in the sample
    report = inspect(capsys, prefix, "--deep")
    assert report["documents_checked_for_eod"] == 3000
    assert report["documents_ending_with_eod"] == 2999


def test_a_flipped_bit_of_the_tokens(tmp_path: Path, capsys) -> None:
    prefix = write_tokens(tmp_path / "t", DOCUMENTS)
    paths = token_file_paths(prefix)
    flip(paths.bin, 2)  # 9 becomes 8: in the vocabulary
    assert inspect(capsys, prefix)["verified"] == "sizes"
    assert "SHA-256" in damage(capsys, prefix, paths.bin, "--deep")


def test_a_flipped_bit_of_the_index(tmp_path: Path, capsys) -> None:
    prefix = write_tokens(tmp_path / "t", DOCUMENTS)
    paths = token_file_paths(prefix)
    flip(paths.idx, 34)
    damage(capsys, prefix, paths.idx)  # the lengths do not fit the pointers any more


def test_an_id_outside_of_the_vocabulary(tmp_path: Path, capsys) -> None:
    prefix = write_tokens(tmp_path / "t", [[1, 2, 10, EOD]])  # hashes agree, 10 is not below 10
    assert inspect(capsys, prefix)["vocab_size"] == 10
    assert "id 10" in damage(capsys, prefix, token_file_paths(prefix).bin, "--deep")
    with IndexedDatasetWriter(tmp_path / "n", np.int32) as writer:
        writer.add_document([1, -2])
    assert "id -2" in damage(capsys, tmp_path / "n", tmp_path / "n.bin", "--deep")


def test_truncated_tokens(tmp_path: Path, capsys) -> None:
    for described in (True, False):
        prefix = write_tokens(tmp_path / f"t{described}", DOCUMENTS, described)
        paths = token_file_paths(prefix)
        paths.bin.write_bytes(paths.bin.read_bytes()[:-1])
        assert "23 bytes" in damage(capsys, prefix, paths.bin)
        paths.bin.unlink()
        assert "missing" in damage(capsys, prefix, paths.bin)


def test_the_head_is_decoded(tmp_path: Path, capsys) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["ab\ttab"], vocab_size=256, show_progress=False)
    texts = ["def f():\n\treturn 1\n", "naïve \x1b[31m red", "x" * 300]
    prefix = tmp_path / "t"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(tokenizer.encode(text).ids)
    report = inspect(capsys, prefix, "--head", "2")
    assert [entry["ids"] for entry in report["head"]] == [
        tokenizer.encode(t).ids for t in texts[:2]
    ]
    (tmp_path / "t.tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "t.tokenizer" / "tokenizer.json"))
    head = inspect(capsys, prefix, "--head", "9")["head"]
    assert [entry["text"] for entry in head] == [texts[0], texts[1], "x" * 256]
    assert [(e["document"], e["tokens"], e["shown"]) for e in head][2] == (2, 300, 256)
    assert main(["inspect", str(prefix), "--head", "2"]) == 0
    shown = capsys.readouterr().out
    assert "| def f():\n" in shown
    assert "naïve \\x1b[31m red" in shown
    assert "\x1b" not in shown


def test_a_directory_of_the_same_name(tmp_path: Path, capsys) -> None:
    prefix = write_tokens(tmp_path / "t", DOCUMENTS)
    prefix.mkdir()
    assert inspect(capsys, prefix)["kind"] == "tokens"
    write_weights_checkpoint(prefix, MODEL, Phi(MODEL).state_dict().items(), None, {})
    assert inspect(capsys, prefix)["kind"] == "checkpoint"
    assert inspect(capsys, f"{prefix}.bin")["kind"] == "tokens"


# runs and checkpoints


@pytest.fixture
def run(tmp_path: Path, toy_tokens: Path, train_here: Callable[[list[str]], Any]) -> Path:
    """A run of 20 steps that was restarted after 10: checkpoints of steps 10, 15 and 20."""
    directory = tmp_path / "run"
    options = {"data__planned_samples": 160}
    for steps in (10, 20):
        train_here(toy_options(toy_tokens, directory, train__steps=steps, **options))
    return directory


def tensor_file(checkpoint: Path) -> Path:
    (path,) = checkpoint.glob("*.safetensors")
    return path


def test_run(run: Path, capsys) -> None:
    (run / "step-00000005.corrupt-1").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')  # killed here
    report = inspect(capsys, run)
    rows = metrics_without_torn_line(run)
    training = [row for row in rows if "loss" in row]
    rates = [row["tokens_per_second_per_gpu"] for row in training]
    assert report["kind"] == "run"
    assert (report["last_step"], report["planned_steps"]) == (20, 20)
    assert report["loss"] == training[-1]["loss"]
    assert report["validation_loss"] == rows[-1]["validation_loss"]
    assert report["validation_step"] == 20
    assert report["nonfinite_steps"] == 0
    assert report["tokens_seen"] == 20 * 8 * 32
    assert report["median_tokens_per_second_per_gpu"] == statistics.median(rates)
    assert report["restarts"] == 1
    assert report["latest"] == "step-00000020"
    (run / "latest").write_bytes(b"\xff\0 no name")
    assert inspect(capsys, run)["latest"] == "\ufffd\0 no name"
    assert report["set_aside"] == ["step-00000005.corrupt-1"]
    assert report["recipe"]["train.global_batch_size"] == 8
    assert report["recipe"]["optimizer.learning_rate"] == 1e-3
    size = {
        name: sum(p.stat().st_size for p in (run / name).iterdir() if p.name != "manifest.json")
        for name in ("step-00000020", "step-00000015", "step-00000010")
    }
    assert report["checkpoints"] == [
        {"name": name, "step": int(name[5:]), "bytes": size[name], "verified": "sizes"}
        for name in size
    ]
    assert {entry["verified"] for entry in inspect(capsys, run, "--deep")["checkpoints"]} == {
        "hashes"
    }
    assert main(["inspect", str(run)]) == 0
    assert "name step-00000015, step 15" in capsys.readouterr().out


def metrics_without_torn_line(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().removesuffix('{"step": 21, "lo'))
    return metrics(run)


def test_a_damaged_checkpoint_does_not_hide_the_others(run: Path, capsys) -> None:
    damaged = tensor_file(run / "step-00000015")
    flip(damaged, -1)
    assert inspect(capsys, run)["checkpoints"][1]["verified"] == "sizes"
    newest, older, _ = inspect(capsys, run, "--deep", status=1)["checkpoints"]
    assert newest["verified"] == "hashes"
    assert older["verified"] is None
    assert str(damaged) in older["problem"]
    assert main(["inspect", str(run), "--deep"]) == 1
    shown = capsys.readouterr()
    assert "verified hashes" in shown.out
    assert str(damaged) in shown.err


def test_checkpoint(run: Path, toy_tokens: Path, capsys) -> None:
    directory = run / "step-00000020"
    report = inspect(capsys, directory)
    model = Model(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, max_sequence_length=64)
    assert (report["kind"], report["step"]) == ("checkpoint", 20)
    assert (report["consumed_samples"], report["tokens_seen"]) == (160, 160 * 32)
    assert report["parameters"] == sum(p.numel() for p in Phi(model).parameters())
    assert report["dtypes"] == ["F32"]
    assert Model(**report["model"]) == dataclasses.replace(
        model, residual_dropout=0.1, attention_dropout=0.1
    )
    assert report["optimizer_state"] is True
    assert report["tokenizer"] is False
    assert (report["files"], report["processes"]) == (4, 1)
    assert report["recipe"]["data.train"] == str(toy_tokens)
    assert report["recipe"]["train.seed"] == 1234
    assert report["environment"]["torch"] == torch.__version__
    assert report["verified"] == "sizes"
    assert inspect(capsys, directory, "--deep") == report | {"verified": "hashes"}
    assert main(["inspect", str(directory)]) == 0
    assert "parameters" in capsys.readouterr().out


def test_damaged_checkpoints(run: Path, capsys) -> None:
    directory = run / "step-00000020"
    tensors, state = tensor_file(directory), directory / "trainer.json"
    size = tensors.stat().st_size
    flip(tensors, size // 2)
    assert inspect(capsys, directory)["verified"] == "sizes"
    assert "SHA-256" in damage(capsys, directory, tensors, "--deep")
    flip(tensors, size // 2)
    assert inspect(capsys, directory, "--deep")["verified"] == "hashes"

    flip(state, 12)  # small files are hashed always
    assert "SHA-256" in damage(capsys, directory, state)
    flip(state, 12)
    (directory / "extra").write_text("x")
    assert "not listed" in damage(capsys, directory, directory / "extra")
    (directory / "extra").unlink()
    tensors.write_bytes(tensors.read_bytes()[:-3])
    assert f"{size - 3} bytes" in damage(capsys, directory, tensors)
    tensors.unlink()
    assert "missing" in damage(capsys, directory, tensors)
    flip(directory / "manifest.json", 30)
    damage(capsys, directory, directory / "manifest.json")
    (directory / "manifest.json").unlink()
    damage(capsys, directory, directory / "manifest.json")


def test_weights_without_a_trainer(tmp_path: Path, capsys) -> None:
    tensors = Phi(MODEL).bfloat16().state_dict()
    write_weights_checkpoint(tmp_path / "c", MODEL, tensors.items(), None, {"source": "elsewhere"})
    report = inspect(capsys, tmp_path / "c", "--deep")
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert (report["dtypes"], report["source"]) == (["BF16"], "elsewhere")
    assert (report["step"], report["recipe"], report["environment"]) == (None, None, None)
    assert (report["optimizer_state"], report["tokens_seen"]) == (False, None)


@pytest.mark.slow
def test_shards_of_two_processes_are_counted_once(tmp_path: Path, toy_tokens: Path, capsys) -> None:
    from tests.layouts import run_training

    options = toy_options(toy_tokens, tmp_path / "run", train__steps=5)
    assert run_training(options, processes=2).returncode == 0
    report = inspect(capsys, tmp_path / "run" / "step-00000005", "--deep")
    model = Model(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512)
    assert report["parameters"] == sum(p.numel() for p in Phi(model).parameters())
    assert report["processes"] == 2
    assert report["files"] == 5


# what the data stages make, and Hugging Face directories


@pytest.fixture
def records(tmp_path: Path, capsys) -> Path:
    """Three Python files ingested, one of them refused."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("x = 1\n")
    (source / "b.py").write_text("yy = 22\n")
    (source / "c.py").write_bytes(b"\xff\xfe")
    out = tmp_path / "records"
    assert main(["data", "ingest", str(source), "--out", str(out), "--workers", "1"]) == 0
    capsys.readouterr()
    return out


def test_records(records: Path, capsys) -> None:
    report = inspect(capsys, records)
    assert (report["kind"], report["stage"]) == ("records", "ingest")
    assert (report["records_in"], report["records_out"]) == (3, 2)
    assert report["rejected"] == {"utf8": 1}
    assert report["text_bytes"] == 6 + 8
    (part,) = records.glob("part-*")
    assert (report["files"], report["bytes"]) == (1, part.stat().st_size)
    assert inspect(capsys, records, "--deep") == report | {"verified": "hashes"}
    flip(part, 20)
    assert inspect(capsys, records) == report
    damage(capsys, records, part, "--deep")
    part.write_bytes(part.read_bytes()[:-1])
    damage(capsys, records, part)


def test_tokenizer(records: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tokenizer"
    words = ["data", "train-tokenizer", str(records), "--vocab-size", "300", "--out", str(out)]
    assert main(words) == 0
    capsys.readouterr()
    report = inspect(capsys, out)
    size = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    assert (report["kind"], report["vocab_size"]) == ("tokenizer", size)
    assert report["texts"] == 2
    (out / "manifest.json").write_text("{")
    damage(capsys, out, out / "manifest.json")


def test_hugging_face(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi", "hidden_size": 6}')
    assert main(["inspect", str(tmp_path)]) == 2
    assert "safetensors" in capsys.readouterr().err
    save_file({"a": torch.zeros(4, 6)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5).half()}, tmp_path / "model-2.safetensors")
    report = inspect(capsys, tmp_path)
    assert (report["kind"], report["parameters"], report["tensors"]) == ("huggingface", 29, 2)
    assert report["dtypes"] == ["F16", "F32"]
    assert report["model"]["hidden_size"] == 6
    assert report["model"]["vocab_size"] is None
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    damage(capsys, tmp_path, path)


# wrong calls


def test_nothing_there_and_unknown(tmp_path: Path, capsys) -> None:
    for target in (tmp_path / "nothing", tmp_path / "nothing.bin", tmp_path):
        assert main(["inspect", str(target), "--json"]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"megaphi: error: {target}: ")
        assert shown.err.count("\n") == 1
    (tmp_path / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path), "--head", "1"]) == 2
    assert "--head" in capsys.readouterr().err


def test_torch_is_not_imported(run: Path, toy_tokens: Path) -> None:
    """The answer must come at once."""
    program = (
        "import sys\n"
        "from tools.cli import main\n"
        "assert [main(['inspect', word]) for word in sys.argv[1:]] == [0] * len(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    targets = [str(toy_tokens), str(run), str(run / "step-00000020")]
    done = subprocess.run(
        [sys.executable, "-c", program, *targets],
        env=child_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
