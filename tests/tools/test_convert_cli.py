"""`megaphi convert` and `megaphi generate` as a user runs them; hostile directories."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaphi.config import Model
from megaphi.formats.hf_config import config_to_hugging_face
from megaphi.formats.weights import CheckpointWeights, write_weights_checkpoint
from megaphi.generate import generate
from megaphi.model.phi import Phi, parameter_shapes
from tools.cli import main

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=300, max_sequence_length=128)
TEXTS = ["def add(a, b):\n    return a + b\n", "x = [1, 2, 3]\n", "naïve café ☃\n"]


def random_model(seed: int = 0) -> Phi:
    generator = torch.Generator().manual_seed(seed)
    model = Phi(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 1.0, generator=generator)
        if name != "embedding.tokens.weight":
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1
            parameter.mul_(scale).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def make_tokenizer(directory: Path, end: str = "<|endoftext|>") -> Path:
    """A byte-level tokenizer of 290 ids; the end of text is the last."""
    directory.mkdir(parents=True)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS * 9, vocab_size=289, show_progress=False)
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return directory


def make_run(directory: Path, tokenizer: bool = True) -> Path:
    """A run directory with one checkpoint."""
    found = make_tokenizer(directory / "tokenizer") if tokenizer else None
    tensors = random_model().state_dict().items()
    write_weights_checkpoint(directory / "step-00000012", CONFIG, tensors, found, {"step": 12})
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# convert


def test_export_is_complete(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf"), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] is True
    assert result["source"] == str(run / "step-00000012")
    out = tmp_path / "hf"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tensors = load_file(out / "model.safetensors")
    assert result["tensors"] == len(tensors) == 33
    assert result["bytes"] == sum(4 * tensor.numel() for tensor in tensors.values())
    config = json.loads((out / "config.json").read_text())
    end = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("<|endoftext|>")
    assert config["eos_token_id"] == config["bos_token_id"] == end == 289
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == end
    card = (out / "README.md").read_text()
    assert "2 x 32 x 2" in card
    assert "| step | 12 |" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_there_and_back_again(tmp_path: Path, capsys) -> None:
    run, out, back = make_run(tmp_path / "run"), tmp_path / "hf", tmp_path / "back"
    assert main(["convert", "to-hf", str(run), str(out), "--max-shard-size", "40KB"]) == 0
    assert main(["convert", "from-hf", str(out), str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokenizer"] is True
    weights = CheckpointWeights(back)
    assert weights.config == CONFIG
    for name, tensor in random_model().state_dict().items():
        assert torch.equal(weights[name], tensor)
    before = tree(run / "step-00000012" / "tokenizer")
    assert tree(back / "tokenizer") == before != {}


def test_without_a_tokenizer_the_end_is_codegens_where_it_fits(tmp_path: Path) -> None:
    make_run(tmp_path / "run", tokenizer=False)
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
    from megaphi.formats.tokenizer_files import end_of_text_id

    assert end_of_text_id(None, 51200) == 50256


def test_existing_output_is_never_touched(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for words in (["to-hf", str(run)], ["from-hf", str(make_hf(tmp_path / "hf"))]):
        assert main(["convert", *words, str(out)]) == 2
        assert re.search("out: already exists", capsys.readouterr().err)
    assert tree(out) == {"mine.txt": b"precious"}
    (out / "mine.txt").unlink()
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    assert (out / "config.json").is_file()


def test_a_damaged_byte_is_named_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    path = run / "step-00000012" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for source in (run / "step-00000012", run):
        assert main(["convert", "to-hf", str(source), str(tmp_path / "new" / "hf")]) == 1
        error = capsys.readouterr().err
        assert str(path) in error
        assert "SHA-256" in error
        assert main(["generate", str(source), "--prompt", "x"]) == 1
        assert str(path) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_values_too_large_for_fp16_are_refused(tmp_path: Path, capsys) -> None:
    tensors = random_model().state_dict()
    tensors["blocks.1.fc1.bias"][3] = 70000.0
    write_weights_checkpoint(tmp_path / "in", CONFIG, tensors.items(), None, {})
    words = ["convert", "to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype"]
    assert main([*words, "fp16"]) == 2
    assert "blocks.1.fc1.bias" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert main([*words, "bf16", "--verify"]) == 0


def test_verify_notices_a_bad_write(tmp_path: Path, capsys, monkeypatch) -> None:
    """A disk that returns another byte than was written."""
    import megaphi.formats.weight_files as weight_files

    run = make_run(tmp_path / "run")
    honest = weight_files.write_safetensors

    def flip(path: Path, tensors: dict, metadata: dict) -> object:
        digest = honest(path, tensors, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(weight_files, "write_safetensors", flip)
    words = ["convert", "to-hf", str(run), str(tmp_path / "hf")]
    assert main([*words, "--verify"]) == 1
    assert "was not written as it is" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_wrong_calls(tmp_path: Path, capsys) -> None:
    hf = make_hf(tmp_path / "hf")
    for words, message in (
        (["to-hf", "microsoft/phi-1", "out"], "hub are not looked up"),
        (["from-hf", "microsoft/phi-1", "out"], "hub are not looked up"),
        (["to-hf", str(hf), str(tmp_path / "out")], "Hugging Face directory already"),
        (["to-hf", str(hf), str(tmp_path / "out"), "--max-shard-size", "5 apples"], "apples"),
    ):
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Hugging Face directories that are not what we read


def make_hf(
    directory: Path,
    change_config: Callable[[dict], object] = lambda config: None,
    change_tensors: Callable[[dict], object] = lambda tensors: None,
) -> Path:
    """A sound directory with a change."""
    make_run(directory.parent / "source-run", tokenizer=False)
    source = directory.parent / "source-run"
    assert main(["convert", "to-hf", str(source), str(directory)]) == 0
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change_config(config)
    change_tensors(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def refused(directory: Path, message: str, capsys, status: int = 2) -> None:
    """The import fails with one line and leaves no trace."""
    parent = directory.parent
    before = tree(parent)
    capsys.readouterr()
    assert main(["convert", "from-hf", str(directory), str(parent / "out" / "deep")]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert tree(parent) == before
    assert not (parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_phi.Phi"}}, "auto_map"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["phi"]}, "model_type"),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"quantization_config": {"bits": 4}}, "a quantized model"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "of type yarn"),
        ({"rope_parameters": {"factor": 4.0}}, "rotary scaling"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"rope_theta": 500.0}, "rope_theta has the values"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"partial_rotary_factor": None, "rope_parameters": None}, None),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"no part of this model: model\.layers\.1"),
        ({"num_hidden_layers": 10**9}, "cannot be 1000000000 layers"),
        ({"num_hidden_layers": 2**62}, "num_hidden_layers"),
        ({"hidden_size": 2**62}, "hidden_size"),
        ({"hidden_size": 64}, r"has the shape \[300, 32\]"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": None}, None),
        ({"vocab_size": 301}, r"has the shape \[300, 32\]"),
    ],
)
def test_configurations_that_we_do_not_read(tmp_path: Path, changes, message, capsys) -> None:
    directory = make_hf(tmp_path / "hf", lambda config: config.update(changes))
    if message is None:  # the cases that show the others are refused for their own reason
        assert main(["convert", "from-hf", str(directory), str(tmp_path / "out")]) == 0
    else:
        refused(directory, message, capsys)


def _swap(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        (lambda t: t.pop("lm_head.bias"), r"missing: lm_head\.bias", 2),
        (lambda t: t.pop("model.embed_tokens.weight"), "not a phi model", 2),
        (lambda t: t.clear() or t.update(a=torch.ones(1)), "not a phi model", 2),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
            r"no part of this model: model\.layers\.0\.self_attn\.q_norm\.weight",
            2,
        ),
        (_swap("model.layers.1.mlp.fc1.weight", lambda t: t.T), r"fc1\.weight has the shape", 2),
        (_swap("lm_head.bias", lambda t: t.long()), r"lm_head\.bias is I64", 1),
        (_swap("lm_head.bias", lambda t: t.to(torch.float8_e4m3fn)), r"lm_head\.bias is F8", 1),
    ],
)
def test_tensors_that_are_no_phi(tmp_path: Path, change, message, status, capsys) -> None:
    refused(make_hf(tmp_path / "hf", change_tensors=change), message, capsys, status)


@pytest.mark.parametrize(
    ("name", "content", "message", "status"),
    [
        ("config.json", b"", "not readable as JSON", 2),
        ("config.json", b"[" * 100_000, "nested too deeply", 2),
        ("config.json", b"[]", "not a JSON object", 2),
        ("config.json", b"\xff\xfe\x00", "not readable as JSON", 2),
        ("config.json", b'{"a":' + b"9" * 9999 + b"}", "not readable as JSON", 2),
        ("tokenizer_config.json", b'{"auto_map": {}}', "auto_map", 2),
        ("modeling_phi.py", b"raise SystemExit(9)", r"modeling_phi\.py: custom model code", 2),
        ("model.safetensors", b"\x10", r"model\.safetensors: not a readable", 1),
        ("model.safetensors", b"\xff" * 99, r"model\.safetensors: not a readable", 1),
        ("twin.safetensors", None, "is also in model.safetensors", 2),
        ("model.safetensors.index.json", b"{}", "no weight_map", 2),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"lm_head.bias": "../../secret.safetensors"}}',
            "not the plain name",
            2,
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"lm_head.bias": "model-00001-of-00002.safetensors"}}',
            "model-00001-of-00002.safetensors: missing",
            2,
        ),
    ],
)
def test_files_that_are_hostile(tmp_path: Path, name, content, message, status, capsys) -> None:
    directory = make_hf(tmp_path / "hf")
    if content is None:
        content = (directory / "model.safetensors").read_bytes()
    (directory / name).write_bytes(content)
    refused(directory, message, capsys, status)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.path}",))


# runs the command and reports everything that could run code or reach the network
_AUDITED = """
import sys
import safetensors.torch, torch, tokenizers, tools.cli, tools.convert, megaphi.formats.weights
events = []
WATCHED = ("pickle.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.",
           "subprocess.", "ctypes.dlopen")
sys.addaudithook(lambda name, args: events.append(name) if name.startswith(WATCHED) else None)
status = tools.cli.main(sys.argv[1:])
print(status, events)
"""


def test_pickles_and_code_are_never_run(tmp_path: Path, capsys) -> None:
    directory = make_hf(tmp_path / "hf")
    canary = tmp_path / "canary"
    payload = pickle.dumps(_Canary(canary))
    (directory / "pytorch_model.bin").write_bytes(payload)
    (directory / "training_args.bin").write_bytes(payload)
    (directory / "README.md").write_bytes(payload)

    def audited(*words: str) -> str:
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run(
            [sys.executable, "-c", _AUDITED, "convert", "from-hf", *words],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    # beside safetensors they are left alone; alone they are refused
    assert audited(str(directory), str(tmp_path / "good")) == "0 []"
    (directory / "model.safetensors").unlink()
    assert audited(str(directory), str(tmp_path / "bad")) == "2 []"
    refused(directory, r"pytorch_model\.bin: pickled weights can run code", capsys)
    assert not canary.exists()
    # the canary works: unpickled, it sings
    pickle.loads(payload)
    assert canary.exists()


def test_gaps_in_our_own_map_would_show() -> None:
    """Every tensor of the export is of the written configuration's shape, none is shared."""
    from megaphi.formats.hf import to_hugging_face

    names: list[str] = []
    elements = 0
    for name, shape in parameter_shapes(CONFIG).items():
        for target, tensor in to_hugging_face(name, torch.empty(shape), CONFIG):
            names.append(target)
            elements += tensor.numel()
    assert len(names) == len(set(names)) == 33
    assert elements == sum(parameter.numel() for parameter in Phi(CONFIG).parameters())
    assert config_to_hugging_face(CONFIG, torch.float32, 7)["eos_token_id"] == 7


# generate


def expected_text(run: Path, prompt: str, count: int, **settings: float) -> str:
    if "seed" in settings:  # of the first sample of the first prompt
        digest = hashlib.sha256(f"{settings['seed']}/0/0".encode()).digest()
        settings["seed"] = int.from_bytes(digest[:7], "little")
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    seeds = {"seed": [settings.pop("seed")]} if "seed" in settings else {}
    (tokens,) = generate(
        random_model(), [ids], max_new_tokens=count, eos_id=289, **settings, **seeds
    )
    assert tokens
    return tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hugging face"])
def test_prompt_is_continued(tmp_path: Path, capsys, kind: str) -> None:
    run = make_run(tmp_path / "run")
    model = run
    if kind == "checkpoint":
        model = run / "step-00000012"
    if kind == "hugging face":
        model = tmp_path / "hf"
        assert main(["convert", "to-hf", str(run), str(model)]) == 0
    capsys.readouterr()
    prompt = "def add(a, b):"
    assert main(["generate", str(model), "--prompt", prompt, "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == prompt + expected_text(run, prompt, 20) + "\n"


def test_a_terminal_gets_the_text_as_it_grows(tmp_path: Path, capsys, monkeypatch) -> None:
    run = make_run(tmp_path / "run")
    words = ["generate", str(run), "--prompt", "x = ", "--max-new-tokens", "40"]
    sampling = ["--temperature", "2", "--seed", "3"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writes: list[str] = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: writes.append(text) or write(text))
    assert main([*words, *sampling]) == 0
    expected = expected_text(run, "x = ", 40, temperature=2.0, seed=3)
    assert capsys.readouterr().out == "x = " + expected + "\n"
    assert len([text for text in writes if text.strip()]) > 15


def test_json_result(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "prompt.txt").write_text("x = [1", encoding="utf-8")
    words = ["generate", str(run), "--prompt-file", str(tmp_path / "prompt.txt"), "--json"]
    sampling = ["--temperature", "1.2", "--top-p", "0.9", "--seed", "4", "--max-new-tokens", "25"]
    assert main([*words, *sampling]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = expected_text(run, "x = [1", 25, temperature=1.2, top_p=0.9, seed=4)
    assert result["completion"] == expected
    assert result["prompt"] == "x = [1"
    assert result["completion_tokens"] == 25
    assert result["finish_reason"] == "length"


def test_special_text_in_a_prompt_stays_text(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    words = ["generate", str(run), "--json", "--max-new-tokens", "1", "--prompt"]
    assert main([*words, "<|endoftext|>"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 5


def test_empty_prompt_starts_a_document(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert main(["generate", str(run), "--prompt", "", "--max-new-tokens", "5"]) == 0
    (tokens,) = generate(random_model(), [[289]], max_new_tokens=5, eos_id=289)
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


def test_missing_tokenizer_says_what_to_do(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run", tokenizer=False)
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    tokenizer = make_tokenizer(tmp_path / "elsewhere")
    words = ["generate", str(run), "--prompt", "x", "--tokenizer", str(tokenizer)]
    assert main([*words, "--max-new-tokens", "3"]) == 0


def test_context_overflow_states_the_limits(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "128"]) == 2
    assert re.search("1 tokens; with --max-new-tokens 128 .* 128", capsys.readouterr().err)


def test_unknown_device_is_a_line(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert main(["generate", str(run), "--prompt", "x", "--device", "abacus"]) == 2
    assert "--device abacus cannot be used" in capsys.readouterr().err
