"""Our names and shapes against Hugging Face's `PhiForCausalLM`, in both directions.

Two things differ. Our `blocks.i.qkv` has the rows of q, k and v grouped by head ([heads, 3, head
size]), Hugging Face has three matrices. And our block ends with the LayerNorm that the next one
reads, so `embedding.norm` is layer 0's `input_layernorm`, `blocks.i.norm` layer i + 1's, and the
last is `final_layernorm`. The rotary embedding is the same half-rotation, so no row moves.

Two older layouts of the same model ("mixformer", as phi-1 was first released) are read as well:
`Wqkv` there is [3, heads, head size].

A directory is only read here: config.json as JSON, tensors as safetensors. Nothing in it is run,
unpickled or handed to transformers, and what we cannot represent exactly is refused.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.checkpoint.files import StoredTensor, read_header, read_json_object
from megaphi.config import Model
from megaphi.model.phi import parameter_shapes

END_OF_TEXT = "<|endoftext|>"
CODEGEN_END_OF_TEXT_ID = 50256
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_INDEX_NAME = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# a table that follows from the configuration; old files carry it
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Layout:
    """Tensor names of one way to write the model; {} is the number of a layer."""

    embedding: str
    layer: str
    first_layer: int
    norm: str
    qkv: tuple[str, ...]
    out: str
    final_norm: str
    head: str


HUGGING_FACE = _Layout(
    embedding="model.embed_tokens",
    layer="model.layers.{}",
    first_layer=0,
    norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.dense",
    final_norm="model.final_layernorm",
    head="lm_head",
)
_MIXFORMER = _Layout(
    embedding="transformer.embd.wte",
    layer="transformer.h.{}",
    first_layer=0,
    norm="ln",
    qkv=("mixer.Wqkv",),
    out="mixer.out_proj",
    final_norm="lm_head.ln",
    head="lm_head.linear",
)
# the first release: one nn.Sequential, the embedding is its entry 0 and the head its last
_MIXFORMER_SEQUENTIAL = _Layout(
    embedding="layers.0.wte",
    layer="layers.{}",
    first_layer=1,
    norm="ln",
    qkv=("mixer.Wqkv",),
    out="mixer.out_proj",
    final_norm="layers.{}.ln",
    head="layers.{}.linear",
)


def source_names(name: str, config: Model, layout: _Layout = HUGGING_FACE) -> list[str]:
    """The tensors of `layout` that make up our parameter `name`: three for `qkv`, else one."""
    *path, part, kind = name.split(".")
    end = layout.first_layer + config.num_layers
    if path == ["embedding"] and part == "tokens":
        stems = [layout.embedding]
    elif path in ([], ["head"]):
        stems = [layout.head.format(end)]
    elif part == "norm":
        # ours closes a block, theirs opens the next
        number = layout.first_layer + (0 if path == ["embedding"] else int(path[1]) + 1)
        last = number == end
        stem = layout.final_norm if last else f"{layout.layer}.{layout.norm}"
        stems = [stem.format(number)]
    else:
        parts = {"qkv": layout.qkv, "out": (layout.out,)}.get(part, (f"mlp.{part}",))
        layer = layout.layer.format(layout.first_layer + int(path[1]))
        stems = [f"{layer}.{stem}" for stem in parts]
    return [f"{stem}.{kind}" for stem in stems]


def to_hugging_face(name: str, tensor: Tensor, config: Model) -> list[tuple[str, Tensor]]:
    """Our parameter as the tensors of `PhiForCausalLM`, with their names."""
    names = source_names(name, config)
    if len(names) == 1:
        return [(names[0], tensor)]
    heads = tensor.view(config.num_heads, 3, config.head_size, *tensor.shape[1:])
    shape = (config.hidden_size, *tensor.shape[1:])
    return [(names[part], heads[:, part].reshape(shape)) for part in range(3)]


def from_sources(name: str, tensors: list[Tensor], config: Model, layout: _Layout) -> Tensor:
    """Our parameter `name` from the tensors that `source_names` lists."""
    if name.split(".")[-2] != "qkv":
        return tensors[0]
    rest = tensors[0].shape[1:]
    shape = (config.num_heads, config.head_size, *rest)
    if len(layout.qkv) == 3:
        parts = torch.stack([tensor.reshape(shape) for tensor in tensors], dim=1)
    else:
        parts = tensors[0].reshape(3, *shape).transpose(0, 1)
    return parts.reshape(3 * config.hidden_size, *rest)


class HuggingFaceWeights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face phi directory by our parameter names, read on demand.

    Attributes:
        directory: the directory.
        config: its model, in our terms.

    Raises:
        ValueError: the configuration, the files or the set of tensors is not one that we read.
        CheckpointError: a tensor file is damaged or holds numbers that are no weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        _refuse_foreign_code(directory)
        self.config = read_config(directory)
        self._stored: dict[str, StoredTensor] = {}
        for path in _tensor_files(directory):
            for stored in read_header(path)[0]:
                if stored.name in self._stored:
                    first = self._stored[stored.name].path.name
                    raise ValueError(f"{path}: {stored.name} is also in {first}")
                if not stored.name.endswith(_DERIVED_SUFFIX):
                    self._stored[stored.name] = stored
        self._layout = self._find_layout()
        self._names = self._check_tensors()

    def _find_layout(self) -> _Layout:
        """The layout whose embedding is there."""
        for layout in (HUGGING_FACE, _MIXFORMER, _MIXFORMER_SEQUENTIAL):
            if f"{layout.embedding}.weight" in self._stored:
                return layout
        raise ValueError(
            f"{self.directory}: no {HUGGING_FACE.embedding}.weight among its "
            f"{len(self._stored)} tensors, so this is not a phi model"
        )

    def _check_tensors(self) -> list[str]:
        """Compare names and shapes with the configuration; return our names."""
        config, layout = self.config, self._layout
        if config.num_layers > len(self._stored):
            raise ValueError(
                f"{self.directory}: {len(self._stored)} tensors cannot be "
                f"{config.num_layers} layers"
            )
        shapes = parameter_shapes(config)
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            sources = source_names(name, config, layout)
            share = (shape[0] // len(sources), *shape[1:])
            expected.update(dict.fromkeys(sources, share))
        for problem, names in (
            ("missing", sorted(expected.keys() - self._stored.keys())),
            ("not part of a phi model of this shape", sorted(self._stored.keys() - expected.keys())),
        ):
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" * (len(names) > 4))
                raise ValueError(f"{self.directory}: tensors {problem}: {shown}")
        for source, shape in expected.items():
            stored = self._stored[source]
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.path}: {source} has the shape {list(stored.shape)}, config.json "
                    f"makes it {list(shape)}"
                )
            assert stored.torch_dtype is not None  # raises for numbers that are no weights
        return list(shapes)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The formats in which the parameters are stored."""
        return {stored.torch_dtype for stored in self._stored.values()}

    def __getitem__(self, name: str) -> Tensor:
        """The parameter in our shape, on the CPU."""
        sources = source_names(name, self.config, self._layout)
        tensors = [self._stored[source].read() for source in sources]
        return from_sources(name, tensors, self.config, self._layout)

    def __iter__(self) -> Iterator[str]:
        """Parameter names in the order of the model."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._names)


def _refuse_foreign_code(directory: Path) -> None:
    """Raise a `ValueError` for a directory that brings code of its own or only pickles."""
    files = sorted(path.name for path in directory.iterdir())
    for name in files:
        if name.endswith(".py"):
            raise ValueError(
                f"{directory / name}: custom model code is not run or converted; remove it if the "
                "weights are a plain phi model's"
            )
    if not any(name.endswith(".safetensors") for name in files):
        pickles = [name for name in files if name.endswith(_PICKLE_SUFFIXES)]
        if pickles:
            raise ValueError(
                f"{directory / pickles[0]}: pickled weights can run code and are not read; convert "
                "them to safetensors first"
            )
        raise ValueError(f"{directory}: no *.safetensors file")


def _tensor_files(directory: Path) -> list[Path]:
    """The files that hold the weights: those of the index, else every *.safetensors."""
    index = directory / _INDEX_NAME
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    for name in weight_map.values():
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {str(name)[:80]!r} is not the plain name of a safetensors file"
            )
    paths = [directory / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {_INDEX_NAME} names it")
    return paths


def find_tokenizer(source: Path) -> Path | None:
    """The directory with the tokenizer.json that belongs to a model, if there is one.

    It is looked for in a checkpoint's `tokenizer/`, in that of its run, and in a Hugging Face
    directory itself.
    """
    candidates = [source / "tokenizer", source]
    if source.name.startswith("step-"):
        candidates.append(source.parent / "tokenizer")
    return next((path for path in candidates if (path / "tokenizer.json").is_file()), None)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a directory, and nothing else; return their names."""
    target.mkdir(exist_ok=True)
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def end_of_text_id(tokenizer_dir: Path | None, vocab_size: int) -> int | None:
    """Id of the token between documents.

    It is what the tokenizer calls its `eos_token` (`<|endoftext|>` if it does not say). Without a
    tokenizer it is CodeGen's, where the vocabulary is large enough.

    Raises:
        ValueError: the tokenizer's files are not readable, or its token is outside `vocab_size`.
    """
    if tokenizer_dir is None:
        return CODEGEN_END_OF_TEXT_ID if vocab_size > CODEGEN_END_OF_TEXT_ID else None
    tokenizer = read_json_object(tokenizer_dir / "tokenizer.json")
    token: Any = None
    if (tokenizer_dir / "tokenizer_config.json").is_file():
        token = read_json_object(tokenizer_dir / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    token = token if isinstance(token, str) else END_OF_TEXT
    added = tokenizer.get("added_tokens") or []
    ids = {entry["content"]: entry["id"] for entry in added}
    identity = ids.get(token, tokenizer.get("model", {}).get("vocab", {}).get(token))
    if identity is not None and not 0 <= identity < vocab_size:
        raise ValueError(
            f"{tokenizer_dir}: its {token} is id {identity}, the model has {vocab_size} ids"
        )
    return identity


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
    """Translate a `phi` or `mixformer-sequential` configuration; `path` is for messages."""
    reader = _ConfigReader(values, path)
    model_type = values.get("model_type")
    if model_type not in ("phi", "mixformer-sequential"):
        raise ValueError(f"{path}: model_type is {model_type!r}, only phi models are read")
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
