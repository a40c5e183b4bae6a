"""config.json of Hugging Face's Phi against our model section, in both directions.

What our model cannot represent exactly is refused with one line, never approximated. Written are
both spellings of the rotary settings: transformers 5 reads `rope_parameters`, transformers 4 only
the top-level `partial_rotary_factor` and `rope_theta`, and silently takes defaults without them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megaphi.config import Model
from megaphi.formats.files import read_json_object

_MIXFORMER_TYPES = ("mixformer-sequential", "phi-msft")


def read_config(directory: Path) -> Model:
    """Read config.json of a Hugging Face directory as our model configuration.

    Raises:
        ValueError: one line about what is missing, malformed or not supported.
    """
    path = directory / "config.json"
    values = read_json_object(path)
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).is_file() and "auto_map" in read_json_object(directory / name):
            raise ValueError(
                f"{directory / name}: auto_map asks for custom code, which is never run; remove "
                "the key if the weights are a plain phi model's"
            )
    return model_from_config(values, path)


def model_from_config(values: Mapping[str, Any], path: Path) -> Model:
    """Translate the configuration of a phi model; `path` is for messages.

    Read are `phi` (phi-1, phi-1.5, phi-2 and our exports), and the names under which Microsoft
    released the same models first, `mixformer-sequential` and `phi-msft`.
    """
    reader = _ConfigReader(values, path)
    model_type = values.get("model_type")
    if model_type not in ("phi", *_MIXFORMER_TYPES):
        raise ValueError(f"{path}: model_type is {model_type!r:.60}, only phi models are read")
    # quantized weights are another kind of number under the same names
    reader.refuse_unless("quantization_config", (None,), "a quantized model")
    reader.refuse_unless("tie_word_embeddings", (False, None), "tied embeddings")
    reader.refuse_unless("qk_layernorm", (False, None), "LayerNorm of queries and keys")
    if model_type == "phi":
        return _phi_config(reader)
    return _mixformer_config(reader)


class _ConfigReader:
    """Typed access to config.json; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def integer(self, key: str, default: int | None) -> int:
        """A whole number from 1 to 2^31 - 1; null counts as absent."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{self.path}: {key} is {str(value)[:40]}, not a size")
        return value

    def number(self, key: str, default: float, values: Mapping[str, Any] | None = None) -> float:
        """A finite number; null counts as absent."""
        value = (self.values if values is None else values).get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{self.path}: {key} is {str(value)[:40]}, not a number")
        return float(value)

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], what: str) -> None:
        """Refuse a value that stands for something our model does not have."""
        value = self.values.get(key)
        if value not in allowed:
            raise ValueError(f"{self.path}: {what} ({key}={str(value)[:40]}) is not supported")


def _phi_config(reader: _ConfigReader) -> Model:
    """The configuration of `PhiForCausalLM`; absent keys have transformers' defaults."""
    heads = reader.integer("num_attention_heads", 32)
    hidden = reader.integer("hidden_size", 2048)
    inner = reader.integer("intermediate_size", 8192)
    reader.refuse_unless("num_key_value_heads", (None, heads), "grouped-query attention")
    reader.refuse_unless("head_dim", (None, hidden // heads), "a head size of its own")
    reader.refuse_unless("hidden_act", ("gelu_new", None), "another activation than gelu_new")
    theta, fraction = _rotary_settings(reader)
    return Model(
        num_layers=reader.integer("num_hidden_layers", 24),
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=None if inner == 4 * hidden else inner,
        vocab_size=reader.integer("vocab_size", 51200),
        max_sequence_length=reader.integer("max_position_embeddings", 2048),
        rotary_fraction=fraction,
        rotary_base=theta,
        layer_norm_epsilon=reader.number("layer_norm_eps", 1e-5),
        initializer_range=reader.number("initializer_range", 0.02),
    )


def _rotary_settings(reader: _ConfigReader) -> tuple[float, float]:
    """Base and fraction of the rotary embedding from either spelling, which must agree."""
    found: dict[str, set[float]] = {"rope_theta": set(), "partial_rotary_factor": set()}
    sources: list[Mapping[str, Any]] = [reader.values]
    for key in ("rope_parameters", "rope_scaling"):
        nested = reader.values.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise ValueError(f"{reader.path}: {key} is not an object")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default" or "factor" in nested:
            raise ValueError(
                f"{reader.path}: rotary scaling ({key} of type {str(kind)[:40]}) is not supported"
            )
        sources.append(nested)
    for source in sources:
        for key, values in found.items():
            if source.get(key) is not None:
                values.add(reader.number(key, math.nan, source))
    for key, values in found.items():
        if len(values) > 1:
            raise ValueError(
                f"{reader.path}: {key} has the values {sorted(values)} in different places; which "
                "one is right?"
            )
    theta = next(iter(found["rope_theta"]), 10000.0)
    return theta, next(iter(found["partial_rotary_factor"]), 0.5)


def _mixformer_config(reader: _ConfigReader) -> Model:
    """The configuration of the first release of phi-1; absent keys have its defaults."""
    heads = reader.integer("n_head", 32)
    hidden = reader.integer("n_embd", 2048)
    inner = reader.integer("n_inner", 4 * hidden)
    rotary_dim = reader.integer("rotary_dim", 32)
    reader.refuse_unless("num_local_experts", (None,), "a mixture of experts")
    reader.refuse_unless("n_head_kv", (None, heads), "grouped-query attention")
    reader.refuse_unless("activation_function", ("gelu_new", None), "another activation")
    reader.refuse_unless("rope_scaling", (None,), "rotary scaling")
    fraction = rotary_dim / (hidden // heads) if hidden >= heads else 0.0
    if int(hidden // heads * fraction) < rotary_dim:
        fraction = math.nextafter(fraction, math.inf)  # the product was rounded down
    return Model(
        num_layers=reader.integer("n_layer", 24),
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=None if inner == 4 * hidden else inner,
        vocab_size=reader.integer("vocab_size", 51200),
        max_sequence_length=reader.integer("n_positions", 2048),
        rotary_fraction=fraction,
        layer_norm_epsilon=reader.number("layer_norm_epsilon", 1e-5),
        initializer_range=reader.number("initializer_range", 0.02),
    )


def config_to_hugging_face(
    config: Model, dtype: torch.dtype, end_of_text: int | None
) -> dict[str, Any]:
    """config.json of `PhiForCausalLM` for our model.

    Args:
        config: our model; its dropout is training's affair, written is 0 as phi-1 was released.
        dtype: format of the tensors.
        end_of_text: id of the token between documents; null leaves generation without an end.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "dtype": dtype_name,
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "hidden_act": "gelu_new",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.ffn_size,
        "layer_norm_eps": config.layer_norm_epsilon,
        "max_position_embeddings": config.max_sequence_length,
        "model_type": "phi",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_heads,
        "partial_rotary_factor": config.rotary_fraction,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_parameters": {
            "partial_rotary_factor": config.rotary_fraction,
            "rope_theta": config.rotary_base,
            "rope_type": "default",
        },
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
