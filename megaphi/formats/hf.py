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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.formats.files import (
    StoredTensor,
    overflows,
    read_header,
    read_json_object,
    require_finite,
)
from megaphi.formats.hf_config import read_config
from megaphi.formats.intake import refuse_strange_entries
from megaphi.formats.weight_files import PendingTensor
from megaphi.model.phi import parameter_shapes

_INDEX_NAME = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".metadata", ".distcp"),
)
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


def exported(
    weights: Mapping[str, Tensor], config: Model, dtype: torch.dtype
) -> Iterator[tuple[str, PendingTensor]]:
    """The tensors of `PhiForCausalLM` in model order, each read when it is needed.

    q, k and v come from one parameter of ours, which is read once if they are read in a row.

    Args:
        weights: every parameter by our name.
        config: the model.
        dtype: format of the result. Reading a tensor with a value too large for it raises a
            `ValueError`.
    """
    last: dict[str, dict[str, Tensor]] = {}

    def read(name: str, target: str) -> Tensor:
        if name not in last:
            last.clear()
            tensor = weights[name]
            converted = tensor.to(dtype)
            if overflows(tensor, converted):
                raise ValueError(f"{name} has values too large for {dtype}; take bf16 or fp32")
            last[name] = dict(to_hugging_face(name, converted, config))
        tensor = last[name].pop(target)
        if not last[name]:
            last.clear()
        return tensor

    for name, shape in parameter_shapes(config).items():
        targets = source_names(name, config)
        share = (shape[0] // len(targets), *shape[1:])
        for target in targets:
            yield target, PendingTensor(share, dtype, partial(read, name, target))


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
        refuse_strange_entries(directory)
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
        unknown = self._stored.keys() - expected.keys()
        for problem, names in (
            ("missing", sorted(expected.keys() - self._stored.keys())),
            ("that are no part of this model", sorted(unknown)),
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

    def pending(self) -> Iterator[tuple[str, PendingTensor]]:
        """Every parameter by name, to be read when it is needed."""
        shapes = parameter_shapes(self.config)
        for name in self._names:
            sources = source_names(name, self.config, self._layout)
            dtypes = {self._stored[source].torch_dtype for source in sources}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            read = partial(self._read_as, name, dtype)
            yield name, PendingTensor(tuple(shapes[name]), dtype, read)

    def _read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter in a format that holds all its parts."""
        return self[name].to(dtype)

    def __getitem__(self, name: str) -> Tensor:
        """The parameter in our shape, on the CPU.

        Raises:
            CheckpointError: the data cannot be read, or a value is not finite.
        """
        sources = source_names(name, self.config, self._layout)
        tensors = [
            require_finite(self._stored[source].read(), f"{self._stored[source].path}: {source}")
            for source in sources
        ]
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
                "them to safetensors in a sandbox first: safetensors.torch.save_file(torch.load("
                f"'{pickles[0]}', weights_only=True), 'model.safetensors')"
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
