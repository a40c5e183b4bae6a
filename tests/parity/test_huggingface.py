"""The model, its export and its import against transformers' PhiForCausalLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaphi import __version__
from megaphi.config import Model
from megaphi.formats.export_hugging_face import export_hugging_face, import_hugging_face
from megaphi.formats.files import same_bits
from megaphi.formats.hf import HuggingFaceWeights
from megaphi.formats.hf_config import config_to_hugging_face, model_from_config
from megaphi.formats.weights import CheckpointWeights, load_model, write_weights_checkpoint
from megaphi.generate import generate
from megaphi.model.phi import Phi, num_parameters

SHAPES = {
    "two heads of 16, rotary 0.5": Model(
        num_layers=2, hidden_size=32, num_heads=2, vocab_size=97, max_sequence_length=64
    ),
    "four heads of 64, rotary 0.25": Model(
        num_layers=3,
        hidden_size=256,
        num_heads=4,
        vocab_size=300,
        intermediate_size=384,
        max_sequence_length=128,
        rotary_fraction=0.25,
        rotary_base=500.0,
    ),
    "two heads of 64, all rotary": Model(
        num_layers=1,
        hidden_size=128,
        num_heads=2,
        vocab_size=1025,
        intermediate_size=1000,
        max_sequence_length=512,
        rotary_fraction=1.0,
        layer_norm_epsilon=1e-3,
    ),
    "four heads of 16, five layers": Model(
        num_layers=5,
        hidden_size=64,
        num_heads=4,
        vocab_size=50304,
        max_sequence_length=2048,
        rotary_fraction=0.5,
        rotary_base=20000.0,
    ),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request) -> Model:
    return request.param


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong row, sign or position shows in the logits.

    Biases are smaller, so that the next token depends on the text and not on them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
            if "embed" in name and parameter.dim() == 2:
                continue
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.1
            parameter.mul_(scale).add_(1.0 if "norm.weight" in name else 0.0)


def save_ours(directory: Path, config: Model, seed: int = 0) -> Phi:
    model = Phi(config)
    randomise(model, seed)
    write_weights_checkpoint(directory, config, model.state_dict().items(), None, {"step": 12})
    return model.eval()


def their_config(config: Model, **changes) -> transformers.PhiConfig:
    """Built from transformers' own field names, not from our map."""
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_sequence_length,
        "layer_norm_eps": config.layer_norm_epsilon,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    return transformers.PhiConfig(**values)


def their_model(config: Model, seed: int = 0) -> transformers.PhiForCausalLM:
    model = transformers.PhiForCausalLM(their_config(config)).eval()
    randomise(model, seed)
    return model


def tokens_for(config: Model, batch: int = 2, length: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length or config.max_sequence_length)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


@torch.no_grad()
def assert_same_logits(ours: Phi, theirs: transformers.PreTrainedModel, tokens: Tensor) -> None:
    expected = theirs(tokens).logits
    # so large that 1e-4 means something, and different at each position
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)


def test_exported_model_computes_the_same(tmp_path: Path, config: Model) -> None:
    ours = save_ours(tmp_path / "checkpoint", config)
    export_hugging_face(tmp_path / "checkpoint", tmp_path / "hf", verify=True)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(theirs).__name__ == "PhiForCausalLM"
    assert_same_logits(ours, theirs.eval(), tokens_for(config, batch=1))


def test_imported_model_computes_the_same(tmp_path: Path, config: Model) -> None:
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path / "hf")
    import_hugging_face(tmp_path / "hf", tmp_path / "checkpoint")
    for source in ("checkpoint", "hf"):
        loaded = load_model(tmp_path / source, device="cpu", dtype=torch.float32)
        assert_same_logits(loaded.model, theirs, tokens_for(config, batch=1))


def test_round_trip_keeps_every_bit(tmp_path: Path, config: Model) -> None:
    model = save_ours(tmp_path / "first", config)
    export_hugging_face(tmp_path / "first", tmp_path / "hf")
    import_hugging_face(tmp_path / "hf", tmp_path / "second")
    weights = CheckpointWeights(tmp_path / "second")
    assert weights.config == config
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert same_bits(weights[name], tensor), name


@pytest.mark.parametrize("dtype_name", ["bf16", "fp16"])
def test_half_precision_export_rounds_once(tmp_path: Path, dtype_name: str) -> None:
    config = next(iter(SHAPES.values()))
    save_ours(tmp_path / "checkpoint", config)
    export_hugging_face(tmp_path / "checkpoint", tmp_path / "full")
    export_hugging_face(tmp_path / "checkpoint", tmp_path / "half", dtype_name=dtype_name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype_name]
    full = load_file(tmp_path / "full" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert full.keys() == half.keys()
    assert all(same_bits(half[name], full[name].to(dtype)) for name in full)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == dtype


def test_sharded_export_loads(tmp_path: Path) -> None:
    config = SHAPES["four heads of 64, rotary 0.25"]
    ours = save_ours(tmp_path / "checkpoint", config)
    result = export_hugging_face(
        tmp_path / "checkpoint", tmp_path / "hf", max_shard_size="1MB", verify=True
    )
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert result["files"] == len(files) > 3
    # a matrix may be larger than the limit, then it is alone in its file
    assert all(path.stat().st_size < 1e6 + 1e4 or len(load_file(path)) == 1 for path in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert_same_logits(ours, theirs, tokens_for(config))
    import_hugging_face(tmp_path / "hf", tmp_path / "back")
    assert CheckpointWeights(tmp_path / "back").config == config


# Configuration


def test_config_is_theirs(config: Model) -> None:
    written = config_to_hugging_face(config, torch.float32, None)
    ours = transformers.PhiConfig(**written).to_dict()
    theirs = their_config(config).to_dict()
    for key in ("architectures", "dtype", "transformers_version"):
        ours.pop(key), theirs.pop(key)
    # transformers 4 reads the two rotary settings at the top level
    assert written["partial_rotary_factor"] == config.rotary_fraction
    assert written["rope_theta"] == config.rotary_base
    for values in (ours, theirs):
        values.pop("torch_dtype", None)
    assert ours == theirs


def test_both_spellings_of_the_rotary_settings_are_read(config: Model) -> None:
    new = their_config(config).to_dict()
    assert model_from_config(new, Path("config.json")) == config
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {
        "partial_rotary_factor": config.rotary_fraction,
        "rope_theta": config.rotary_base,
        "rope_scaling": None,
        "num_key_value_heads": None,
    }
    assert model_from_config(old, Path("config.json")) == config
    assert transformers.PhiConfig(**old).rope_parameters == new["rope_parameters"]
    both = {**old, "rope_parameters": {**new["rope_parameters"], "rope_theta": 7.0}}
    with pytest.raises(ValueError, match="rope_theta"):
        model_from_config(both, Path("config.json"))


def test_defaults_are_phi_1() -> None:
    assert model_from_config({"model_type": "phi"}, Path("config.json")) == Model()
    assert model_from_config({"model_type": "mixformer-sequential"}, Path("c.json")) == Model()
    theirs = transformers.PhiConfig(bos_token_id=50256, eos_token_id=50256).to_dict()
    ours = transformers.PhiConfig(**config_to_hugging_face(Model(), torch.float32, 50256)).to_dict()
    for values in (ours, theirs):
        for key in ("architectures", "dtype", "transformers_version", "torch_dtype"):
            values.pop(key, None)
    assert ours == theirs


def test_released_configurations_are_read() -> None:
    """The shapes of phi-1, phi-1.5 and phi-2 as their config.json files have them."""
    common = {
        "model_type": "phi",
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    }
    phi_1 = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "partial_rotary_factor": 0.5,
    }
    phi_2 = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
    }
    assert model_from_config({**common, **phi_1}, Path("c")) == Model()
    read = model_from_config({**common, **phi_2}, Path("c"))
    assert (read.head_size, read.rotary_dim, read.num_layers) == (80, 32, 32)
    assert num_parameters(read) == 2_779_683_840
    # the same model as it was released first
    older = {
        "model_type": "phi-msft",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_embd": 2560,
        "n_head": 32,
        "n_head_kv": None,
        "n_inner": None,
        "n_layer": 32,
        "n_positions": 2048,
        "rotary_dim": 32,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    }
    assert model_from_config(older, Path("c")) == read
    with pytest.raises(ValueError, match="mixture of experts"):
        model_from_config({**older, "num_local_experts": 2}, Path("c"))


# The layouts of the first releases


def mixformer_tensors(theirs: transformers.PhiForCausalLM, sequential: bool) -> dict[str, Tensor]:
    """Their weights under the old names; Wqkv is all of q, then all of k, then all of v."""
    state = theirs.state_dict()
    layers = theirs.config.num_hidden_layers
    last = f"layers.{layers + 1}" if sequential else "lm_head"
    table = "layers.0.wte.weight" if sequential else "transformer.embd.wte.weight"
    old = {table: state["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        old[f"{last}.ln.{kind}"] = state[f"model.final_layernorm.{kind}"]
        old[f"{last}.linear.{kind}"] = state[f"lm_head.{kind}"]
        for i in range(layers):
            new = f"model.layers.{i}"
            name = f"layers.{i + 1}" if sequential else f"transformer.h.{i}"
            parts = [state[f"{new}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            old[f"{name}.ln.{kind}"] = state[f"{new}.input_layernorm.{kind}"]
            old[f"{name}.mixer.Wqkv.{kind}"] = torch.cat(parts)
            old[f"{name}.mixer.out_proj.{kind}"] = state[f"{new}.self_attn.dense.{kind}"]
            for part in ("fc1", "fc2"):
                old[f"{name}.mlp.{part}.{kind}"] = state[f"{new}.mlp.{part}.{kind}"]
            if kind == "weight":
                old[f"{name}.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    return {name: tensor.contiguous() for name, tensor in old.items()}


@pytest.mark.parametrize(
    ("sequential", "model_type"),
    [(True, "mixformer-sequential"), (False, "mixformer-sequential"), (False, "phi-msft")],
)
def test_first_releases_are_read(tmp_path: Path, sequential: bool, model_type: str) -> None:
    config = Model(
        num_layers=3,
        hidden_size=96,
        num_heads=4,
        vocab_size=128,
        max_sequence_length=64,
        rotary_fraction=1 / 3,
    )
    theirs = their_model(config)
    tensors = mixformer_tensors(theirs, sequential)
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    values = {
        "model_type": model_type,
        "n_embd": 96,
        "n_head": 4,
        "n_inner": None,
        "n_layer": 3,
        "n_positions": 64,
        "rotary_dim": 8,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 128,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(values))
    assert HuggingFaceWeights(directory).config.rotary_dim == 8
    import_hugging_face(directory, tmp_path / "checkpoint")
    loaded = load_model(tmp_path / "checkpoint", device="cpu", dtype=torch.float32)
    assert_same_logits(loaded.model, theirs, tokens_for(config))


# Generation


def test_greedy_tokens_are_theirs(tmp_path: Path, config: Model) -> None:
    theirs = their_model(config, seed=3)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf", device="cpu", dtype=torch.float32).model
    # of the longest length there is room for 60 new tokens
    lengths = (3, 1, min(70, config.max_sequence_length - 60))
    prompts = [tokens_for(config, 1, length)[0].tolist() for length in lengths]
    together = generate(ours, prompts, max_new_tokens=60)
    assert len({token for tokens in together for token in tokens}) > 20
    for prompt, tokens in zip(prompts, together, strict=True):
        answer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0
        )
        assert tokens == answer[0, len(prompt) :].tolist()


def test_end_of_text_ends_both(tmp_path: Path) -> None:
    config = next(iter(SHAPES.values()))
    theirs = their_model(config, seed=3)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf", device="cpu", dtype=torch.float32).model
    prompt = [5, 6, 7]
    (free,) = generate(ours, [prompt], max_new_tokens=20)
    end = next(token for index, token in enumerate(free) if index >= 4 and token not in free[:4])
    answer = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0
    )[0, 3:].tolist()
    (tokens,) = generate(ours, [prompt], max_new_tokens=20, eos_id=end)
    assert answer == [*tokens, end]
    assert 4 <= len(tokens) < 20


# transformers looks for a package called `kernels`, which is also the name of one of ours

_PROBE = """
import kernels, pathlib, sys
assert pathlib.Path(kernels.__file__).parent.parent == pathlib.Path(sys.argv[1]), kernels.__file__
import torch, transformers
from transformers.utils import is_kernels_available
assert not is_kernels_available()
import transformers.integrations.hub_kernels
config = transformers.PhiConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=None, eos_token_id=None,
)
model = transformers.AutoModelForCausalLM.from_config(config)
print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""


def test_transformers_works_beside_our_kernels() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(root)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 40)"


def test_our_version_is_none_that_transformers_wants_of_kernels() -> None:
    """An installed megaphi answers for `kernels`, with megaphi's version."""
    from packaging.version import parse
    from transformers.utils import import_utils

    wanted = range_of(import_utils)
    assert not wanted[0] <= parse(__version__) < wanted[1]


def range_of(import_utils) -> tuple:
    """The versions of the other `kernels` that this transformers would use."""
    from packaging.version import parse

    lowest = parse(import_utils.KERNELS_MIN_VERSION)
    highest = parse(getattr(import_utils, "KERNELS_MAX_VERSION", "1000"))
    return lowest, highest
