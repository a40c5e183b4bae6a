"""GGUF files against llama.cpp's own reader, its own quantizer and hand-made tokenizers."""

import json
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import megaphi.formats.gguf as gguf_files
from megaphi.config import Model
from megaphi.durable import partial_file
from megaphi.errors import RunError
from megaphi.formats.export_hugging_face import export_hugging_face
from megaphi.formats.gguf import encode
from megaphi.formats.gguf_vocabulary import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import Phi
from tools.cli import main

gguf = pytest.importorskip("gguf", reason='needs pip install "megaphi[gguf]"')

CONFIG = Model(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    vocab_size=12,
    intermediate_size=96,
    max_sequence_length=128,
    rotary_fraction=0.5,
    rotary_base=500.0,
    layer_norm_epsilon=1e-4,
)


def tokenizer_values() -> dict:
    """Five byte letters, two merges, an added and a special token."""
    return {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3, "d": 4, "ab": 5, "Ġab": 6},
            "merges": [["a", "b"], ["Ġ", "ab"]],
        },
        "added_tokens": [
            {"id": 7, "content": "    ", "special": False},
            {"id": 8, "content": "<|endoftext|>", "special": True},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    }


def write_tokenizer(directory: Path, values: dict | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values if values is not None else tokenizer_values())
    (directory / "tokenizer.json").write_text(text)
    return directory


def make_model(directory: Path, scale: float = 1.0) -> Phi:
    torch.manual_seed(0)
    model = Phi(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, scale)
    tokenizer = write_tokenizer(directory.parent / "tok")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_weights_checkpoint(directory, CONFIG, state.items(), tokenizer, {"step": 7})
    return model


def stored(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(reader, key: str):
    return reader.get_field(key).contents()


def test_keys_and_tensors_are_llama_cpps(tmp_path: Path, capsys) -> None:
    model = make_model(tmp_path / "run" / "step-00000007")
    out = tmp_path / "m.gguf"
    words = ["convert", "to-gguf", str(tmp_path / "run"), str(out), "--type", "F32", "--verify"]
    assert main([*words, "--license", "mit", "--name", "little phi", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tensors"], result["verified"]) == (33, True)
    assert result["bytes"] == out.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "run"]
    reader = gguf.GGUFReader(out)
    expected = {
        "general.architecture": "phi2",
        "general.name": "little phi",
        "general.license": "mit",
        "general.file_type": 0,
        "phi2.context_length": 128,
        "phi2.embedding_length": 64,
        "phi2.feed_forward_length": 96,
        "phi2.block_count": 2,
        "phi2.attention.head_count": 4,
        "phi2.attention.head_count_kv": 4,
        "phi2.rope.dimension_count": 8,
        "phi2.rope.freq_base": 500.0,
        "phi2.attention.layer_norm_epsilon": pytest.approx(1e-4),
        "phi2.vocab_size": 12,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "phi-2",
        "tokenizer.ggml.eos_token_id": 8,
        "tokenizer.ggml.bos_token_id": 8,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "megaphi.step": 7,
        "megaphi.checkpoint": "step-00000007",
    }
    for key, value in expected.items():
        assert values(reader, key) == value, key
    tokens = ["a", "b", "c", "Ġ", "d", "ab", "Ġab", "    ", "<|endoftext|>"]
    assert values(reader, "tokenizer.ggml.tokens") == [*tokens, "[PAD9]", "[PAD10]", "[PAD11]"]
    types = [NORMAL] * 7 + [USER_DEFINED, CONTROL] + [UNUSED] * 3
    assert values(reader, "tokenizer.ggml.token_type") == types
    # written from our packed rows by hand: head h holds q, k and v of 16 rows each
    state, found = model.state_dict(), stored(out)
    assert len(found) == 33
    packed = state["blocks.1.qkv.weight"].numpy()
    for part, letter in enumerate("qkv"):
        rows = [packed[48 * head + 16 * part :][:16] for head in range(4)]
        np.testing.assert_array_equal(found[f"blk.1.attn_{letter}.weight"].data, np.vstack(rows))
    pairs = {
        "token_embd.weight": "embedding.tokens.weight",
        "blk.0.attn_norm.bias": "embedding.norm.bias",
        "blk.1.attn_norm.weight": "blocks.0.norm.weight",
        "output_norm.weight": "blocks.1.norm.weight",
        "blk.1.attn_output.weight": "blocks.1.out.weight",
        "blk.0.ffn_up.weight": "blocks.0.fc1.weight",
        "blk.0.ffn_down.bias": "blocks.0.fc2.bias",
        "output.bias": "head.bias",
    }
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(found[theirs].data, state[ours].numpy())


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0"])
def test_types(tmp_path: Path, capsys, type_name: str) -> None:
    model = make_model(tmp_path / "model")
    out = tmp_path / "m.gguf"
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(out), "--type", type_name]
    assert main([*words, "--verify", "--json"]) == 0
    error = json.loads(capsys.readouterr().out)["quantization_error"]
    found, source = stored(out), model.state_dict()["blocks.0.fc1.weight"]
    assert {t.tensor_type.name for t in found.values() if len(t.shape) == 2} == {type_name}
    assert {t.tensor_type.name for t in found.values() if len(t.shape) == 1} == {"F32"}
    data = found["blk.0.ffn_up.weight"].data
    if type_name == "F16":
        np.testing.assert_array_equal(data, source.half().numpy())
        assert error == 0
    elif type_name == "BF16":
        np.testing.assert_array_equal(data.view(np.uint16), source.bfloat16().view(torch.uint16))
        assert error == 0
    else:
        # by hand from the definition: 32 values share a scale of largest / 127 in half precision
        blocks = data.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        back = (blocks[:, 2:].view(np.int8) * scale).reshape(96, 64)
        largest = source.reshape(-1, 32).abs().amax(1).numpy()
        np.testing.assert_allclose(scale[:, 0], largest / 127, rtol=2**-11)
        assert np.abs(back - source.numpy()).max() <= (0.5 + 0.07) * largest.max() / 127
        assert 0.001 < error < 0.01


def test_rows_that_do_not_fill_a_block_stay_in_half_precision(tmp_path: Path) -> None:
    config = Model(num_layers=1, hidden_size=48, num_heads=3, vocab_size=12, intermediate_size=64)
    state = {name: tensor.detach() for name, tensor in Phi(config).state_dict().items()}
    write_weights_checkpoint(
        tmp_path / "model", config, state.items(), write_tokenizer(tmp_path / "tok"), {}
    )
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(tmp_path / "m.gguf"), "--verify"]
    assert main([*words, "--type", "Q8_0"]) == 0
    found = stored(tmp_path / "m.gguf")
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


def test_every_kind_of_model_gives_the_same_tensors(tmp_path: Path) -> None:
    make_model(tmp_path / "run" / "step-00000007")
    export_hugging_face(tmp_path / "run", tmp_path / "hf", max_shard_size="40KB")
    models = (tmp_path / "run", tmp_path / "run" / "step-00000007", tmp_path / "hf")
    files = []
    for number, model in enumerate(models):
        out = tmp_path / f"{number}.gguf"
        assert main(["convert", "to-gguf", str(model), str(out), "--type", "F16"]) == 0
        files.append({name: t.data.tobytes() for name, t in stored(out).items()})
    assert files[0] == files[1] == files[2]


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="needs llama-quantize on PATH")
def test_q4_k_by_llama_cpp(tmp_path: Path, capsys) -> None:
    config = Model(num_layers=1, hidden_size=256, num_heads=4, vocab_size=12)
    state = {n: torch.randn(t.shape) for n, t in Phi(config).state_dict().items()}
    write_weights_checkpoint(
        tmp_path / "model", config, state.items(), write_tokenizer(tmp_path / "tok"), {}
    )
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(tmp_path / "m.gguf"), "--json"]
    assert main([*words, "--type", "Q4_K", "--verify"]) == 0
    assert 0.02 < json.loads(capsys.readouterr().out)["quantization_error"] < 0.15
    found = stored(tmp_path / "m.gguf")
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q4_K"
    assert not list(tmp_path.glob("*partial*"))


def fake_program(directory: Path, script: str) -> Path:
    directory.mkdir()
    program = directory / "llama-quantize"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return directory


def test_quantizer_that_is_missing_or_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    make_model(tmp_path / "model")
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(tmp_path / "out" / "m.gguf")]
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main([*words, "--type", "Q4_K"]) == 2
    assert "llama-quantize, which is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    broken = fake_program(tmp_path / "bin", 'echo loading; echo "cannot $3"; exit 3')
    monkeypatch.setenv("PATH", f"{broken}:/bin:/usr/bin")
    assert main([*words, "--type", "Q4_K"]) == 1
    assert "status 3: cannot Q4_K_M" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_values_too_large_for_f16(tmp_path: Path, capsys) -> None:
    make_model(tmp_path / "model", scale=1e5)
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(tmp_path / "m.gguf"), "--type"]
    assert main([*words, "F16"]) == 2
    assert re_names(capsys.readouterr().err, "token_embd.weight", "--type BF16")
    assert not list(tmp_path.glob("m.gguf*"))
    assert main([*words, "BF16", "--verify"]) == 0


def re_names(text: str, *words: str) -> bool:
    return text.count("\n") == 1 and all(word in text for word in words)


def test_verify_notices_a_bad_write(tmp_path: Path, capsys, monkeypatch) -> None:
    """A disk that returns another byte than was written."""
    make_model(tmp_path / "model")
    honest = gguf_files.write_gguf

    def flip(path: Path, *arguments) -> int:
        count = honest(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-30] ^= 1
        path.write_bytes(content)
        return count

    monkeypatch.setattr(gguf_files, "write_gguf", flip)
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(tmp_path / "m.gguf")]
    assert main([*words, "--type", "F32", "--verify"]) == 1
    assert "output.bias was not written as it is" in capsys.readouterr().err
    assert not list(tmp_path.glob("m.gguf*"))


def test_one_file_at_a_time_and_never_over_another(tmp_path: Path, capsys) -> None:
    make_model(tmp_path / "model")
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    words = ["convert", "to-gguf", str(tmp_path / "model"), str(out)]
    assert main(words) == 2
    assert "m.gguf: already exists" in capsys.readouterr().err
    assert out.read_text() == "precious"
    out.unlink()
    # what a killed process left is overwritten, what a living one writes is not
    (tmp_path / "m.gguf.partial").write_bytes(b"x" * 999_999)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with partial_file(out) as partial:
            entered.set()
            leave.wait(30)
            partial.unlink()
            partial.write_text("mine")

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(30)
    with pytest.raises(RunError, match="another process is writing"), partial_file(out):
        pass
    leave.set()
    holder.join()
    assert out.read_text() == "mine"
    out.unlink()
    (tmp_path / "m.gguf.partial").write_bytes(b"x" * 999_999)
    assert main([*words, "--verify"]) == 0
    assert out.stat().st_size < 999_999


def test_missing_library_names_the_extra(tmp_path: Path, capsys, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name)
    )
    assert main(["convert", "to-gguf", str(tmp_path), str(tmp_path / "m.gguf")]) == 2
    assert 'pip install "megaphi[gguf]"' in capsys.readouterr().err


def test_merges_as_older_tokenizers_write_them(tmp_path: Path) -> None:
    older = tokenizer_values()
    older["model"]["merges"] = ["a b", "Ġ ab"]
    new = read_vocabulary(write_tokenizer(tmp_path / "new"), 12)
    assert read_vocabulary(write_tokenizer(tmp_path / "old", older), 12) == new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "not BPE"),
        (lambda t: t.update(model=[]), "not BPE"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "has a normalizer"),
        (lambda t: t.update(pre_tokenizer=None), "not GPT-2's ByteLevel"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "not GPT-2's ByteLevel"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "not GPT-2's ByteLevel"),
        (lambda t: t["model"].update(merges=["a b c"]), "not a list of pairs"),
        (lambda t: t["model"].update(merges=[["a"]]), "not a list of pairs"),
        (lambda t: t["model"].update(merges=None), "not a list of pairs"),
        (lambda t: t["model"]["vocab"].update(z=12), "the model has 12 ids"),
        (lambda t: t["model"]["vocab"].update(z=-1), "the model has 12 ids"),
        (lambda t: t["model"]["vocab"].update(z=2**63), "the model has 12 ids"),
        (lambda t: t["model"]["vocab"].update(z=0), "two tokens"),
        (lambda t: t["added_tokens"].append({"id": 9, "content": "a"}), "two ids"),
        (lambda t: t["added_tokens"].append(3), "no object"),
        (lambda t: t["added_tokens"].pop(), "no end-of-text token"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ],
)
def test_tokenizers_that_llama_cpp_would_follow_otherwise(tmp_path: Path, change, message) -> None:
    changed = tokenizer_values()
    change(changed)
    with pytest.raises(ValueError, match=message):
        read_vocabulary(write_tokenizer(tmp_path / "t", changed), 12)


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    tensor = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, float("nan"), -0.0])
    raw = encode("t", tensor, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    assert raw.tolist()[:3] == [0x3F80, 0x3F80, 0x3F82]
    assert raw[3] & 0x7F80 == 0x7F80
    assert raw[3] & 0x7F
    assert raw[4] == 0x8000
