"""Model weights without a trainer: found, checked, read tensor by tensor, written, loaded.

Checkpoints are read here without torch.distributed: their shards are plain safetensors files, and
the header of each says where its pieces belong (`DCP_SHARDING_INFO`, written by
torch.distributed.checkpoint's Hugging Face storage; a file without it holds whole tensors). Peak
memory is one full tensor, whatever the size of the model. What a file says is checked against the
model's shape before anything is allocated.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.durable import partial_directory
from megaphi.formats.files import (
    StoredTensor,
    overflows,
    read_header,
    read_json_object,
    require_finite,
)
from megaphi.formats.hf import HuggingFaceWeights
from megaphi.formats.intake import refuse_strange_entries, verify_foreign_checkpoint
from megaphi.formats.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    checkpoint_name,
    find_checkpoints,
    write_manifest,
)
from megaphi.formats.tokenizer_files import copy_tokenizer, find_tokenizer
from megaphi.formats.weight_files import PendingTensor, WrittenShards, write_shards
from megaphi.model.phi import Phi, parameter_shapes

MODEL_CONFIG_NAME = "model.json"
MODEL_PREFIX = "model."
_SHARDING_INFO_KEY = "DCP_SHARDING_INFO"
_OFFSETS_KEY = "saved_offsets"
SHARD_BYTES = 1 << 30


def resolve_model(path: str | Path) -> Path:
    """Find the directory that MODEL means, verified.

    Args:
        path: a run directory (its newest checkpoint that verifies; each bad one is reported on
            stderr), a checkpoint directory, or a Hugging Face directory (not verified: it has no
            manifest).

    Returns:
        A checkpoint directory or a Hugging Face directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory is none of the three.
        CheckpointError: the checkpoint is damaged, or no checkpoint of the run verifies.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{path}: no such directory; MODEL is a run, checkpoint or Hugging Face directory on "
            "this machine (names of the Hugging Face hub are not looked up: download first)"
        )
    if (directory / MANIFEST_NAME).exists() or (directory / MODEL_CONFIG_NAME).exists():
        verify_foreign_checkpoint(directory)
        return directory
    checkpoints = find_checkpoints(directory)
    for checkpoint in checkpoints:
        try:
            verify_foreign_checkpoint(checkpoint)
        except CheckpointError as error:
            print(f"megaphi: skipping a damaged checkpoint: {error}", file=sys.stderr)
        else:
            return checkpoint
    if checkpoints:
        raise CheckpointError(f"{directory}: none of its {len(checkpoints)} checkpoints verifies")
    if (directory / "config.json").is_file():
        refuse_strange_entries(directory)
        return directory
    if (directory / ".metadata").exists():
        raise ValueError(
            f"{directory / '.metadata'}: a pickle of torch.distributed.checkpoint, which can run "
            "code and is not read; export that model as safetensors with what wrote it"
        )
    raise ValueError(
        f"{directory}: not a model: no {checkpoint_name(0)[:5]}… checkpoint (run directory), no "
        f"{MANIFEST_NAME} (checkpoint) and no config.json (Hugging Face directory)"
    )


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory that `resolve_model` returned is a checkpoint (else Hugging Face's)."""
    return (directory / MANIFEST_NAME).exists()


def read_model_config(directory: Path) -> Model:
    """Read `model.json` of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or has a key or value that is not a model's.
    """
    path = directory / MODEL_CONFIG_NAME
    try:
        values = read_json_object(path)
        known = {field.name: field for field in dataclasses.fields(Model)}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{path}: unknown key {key}")
            # a float may be written as a whole number; a bool is an int to Python, not to us
            fits = isinstance(value, known[key].type | int) and not isinstance(value, bool)
            if not fits or (isinstance(value, int) and abs(value) >= 2**31):
                raise ValueError(f"{path}: {key} has the value {str(value)[:40]}")
        return Model(**values)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def write_model_config(directory: Path, config: Model) -> None:
    """Write `model.json` into a checkpoint that is being built."""
    text = json.dumps(dataclasses.asdict(config), indent=1)
    (directory / MODEL_CONFIG_NAME).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Shard:
    """A box of a full tensor: where it starts, and where it is stored."""

    stored: StoredTensor
    offsets: tuple[int, ...]

    @property
    def region(self) -> tuple[slice, ...]:
        """The part of the full tensor that this shard fills."""
        pairs = zip(self.offsets, self.stored.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def overlaps(self, other: "_Shard") -> bool:
        """Whether the two boxes share an element."""
        pairs = zip(self.region, other.region, strict=True)
        return all(a.start < b.stop and b.start < a.stop for a, b in pairs)


class CheckpointWeights(Mapping[str, Tensor]):
    """The model's tensors of a checkpoint, read on demand.

    Keys are parameter names (`blocks.0.qkv.weight`). Opening reads headers only and checks that
    the shards of every parameter tile it exactly. Each access reads the data again; nothing is
    kept.

    Attributes:
        directory: the checkpoint.
        config: its model.

    Raises:
        CheckpointError: a file is unsound, or a tensor is missing, unknown, of another shape or of
            a format that is no floating-point number, or its shards overlap or leave a gap.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_model_config(directory)
        self._shards: dict[str, list[_Shard]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self._add_file(path)
        # ten tensors a layer: a huge number of layers must not make a huge list of shapes
        if self.config.num_layers > len(self._shards):
            raise CheckpointError(
                f"{directory}: {len(self._shards)} model tensors cannot be the "
                f"{self.config.num_layers} layers that {MODEL_CONFIG_NAME} names"
            )
        shapes = parameter_shapes(self.config)
        for name in sorted(self._shards.keys() - shapes.keys()):
            stored = self._shards[name][0].stored
            raise CheckpointError(f"{stored.path}: {stored.name} is no parameter of this model")
        for name, shape in shapes.items():
            if name not in self._shards:
                raise CheckpointError(f"{directory}: no file holds {MODEL_PREFIX}{name}")
            _check_tiling(tuple(shape), self._shards[name])
        self._names = list(shapes)

    def _add_file(self, path: Path) -> None:
        """Sort the shards of one file into `_shards`."""
        entries, metadata = read_header(path)
        info: Any = {}
        if _SHARDING_INFO_KEY in metadata:
            try:
                info = json.loads(metadata[_SHARDING_INFO_KEY])
            except (ValueError, RecursionError):
                raise CheckpointError(f"{path}: {_SHARDING_INFO_KEY} is not JSON") from None
        for stored in entries:
            if not stored.name.startswith(MODEL_PREFIX):
                continue
            offsets = (0,) * len(stored.shape)
            if _SHARDING_INFO_KEY in metadata:
                offsets = _read_offsets(info, stored)
            name = stored.name.removeprefix(MODEL_PREFIX)
            self._shards.setdefault(name, []).append(_Shard(stored, offsets))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The formats in which the parameters are stored."""
        return {shards[0].stored.torch_dtype for shards in self._shards.values()}

    def __getitem__(self, name: str) -> Tensor:
        """The full tensor, assembled on the CPU.

        Raises:
            CheckpointError: the data cannot be read, or a value is not finite.
        """
        shards = self._shards[name]
        if len(shards) == 1:
            return _read_finite(shards[0].stored)
        shape = parameter_shapes(self.config)[name]
        full = torch.empty(shape, dtype=shards[0].stored.torch_dtype)
        for shard in shards:
            full[shard.region] = _read_finite(shard.stored)
        return full

    def __iter__(self) -> Iterator[str]:
        """Parameter names in the order of the model."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._names)


def _read_finite(stored: StoredTensor) -> Tensor:
    return require_finite(stored.read(), f"{stored.path}: {stored.name}")


def _read_offsets(info: Any, stored: StoredTensor) -> tuple[int, ...]:
    """Where a shard starts in its tensor, from the header of its file."""
    entry = info.get(stored.name) if isinstance(info, dict) else None
    offsets = entry.get(_OFFSETS_KEY) if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != len(stored.shape)
        or not all(type(offset) is int and 0 <= offset < 2**63 for offset in offsets)
    ):
        raise CheckpointError(
            f"{stored.path}: {stored.name} has the offsets {str(offsets)[:60]}, needed are "
            f"{len(stored.shape)} whole numbers that are not negative"
        )
    return tuple(offsets)


def _check_tiling(shape: tuple[int, ...], shards: list[_Shard]) -> None:
    """Raise a `CheckpointError` unless the shards fill `shape` exactly, each element once.

    Boxes that lie inside, do not overlap and have as many elements as the whole, fill it.
    """
    first = shards[0].stored
    for shard in shards:
        stored = shard.stored
        if stored.torch_dtype != first.torch_dtype:
            raise CheckpointError(
                f"{stored.path}: {stored.name} is {stored.dtype}, but {first.dtype} in {first.path}"
            )
        inside = len(stored.shape) == len(shape) and all(
            part.stop <= size for part, size in zip(shard.region, shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{stored.path}: {stored.name} of shape {list(stored.shape)} at offset "
                f"{list(shard.offsets)} does not fit the model's {list(shape)}"
            )
    filled = sorted(
        (shard for shard in shards if math.prod(shard.stored.shape) > 0), key=lambda s: s.offsets
    )
    for index, shard in enumerate(filled):
        for other in filled[index + 1 :]:
            if other.region[0].start >= shard.region[0].stop:
                break  # sorted: none of the later ones reaches back
            if shard.overlaps(other):
                raise CheckpointError(
                    f"{other.stored.path}: {other.stored.name} at offset {list(other.offsets)} "
                    f"overlaps its shard in {shard.stored.path}"
                )
    covered = sum(math.prod(shard.stored.shape) for shard in filled)
    if covered != math.prod(shape):
        raise CheckpointError(
            f"{first.path}: {first.name} has {covered} of {math.prod(shape)} elements; a shard is "
            "missing"
        )


def write_weights_checkpoint(
    directory: Path,
    model_config: Model,
    tensors: Iterable[tuple[str, Tensor | PendingTensor]],
    tokenizer_dir: Path | None,
    details: Mapping[str, Any],
) -> WrittenShards:
    """Publish a checkpoint that holds a model's weights and nothing of a trainer.

    Everything is written to `DIRECTORY.partial` and appears by one rename; a failure leaves
    nothing behind. Memory: the largest tensor if they are pending, else up to 1 GiB of them.

    Args:
        directory: the checkpoint to create; it may exist only if it is empty.
        model_config: the model.
        tensors: every parameter once, by name, in its full shape.
        tokenizer_dir: a tokenizer to copy along.
        details: further entries of the manifest, for instance where the weights come from.

    Returns:
        The files of the tensors.

    Raises:
        ValueError: `directory` is not free, or a tensor is missing, unknown or of another shape.
    """
    shapes = parameter_shapes(model_config)

    def checked() -> Iterator[tuple[str, Tensor | PendingTensor]]:
        for name, tensor in tensors:
            if shapes.get(name) != tuple(tensor.shape):
                raise ValueError(f"{name} of shape {list(tensor.shape)} is not in this model")
            yield f"{MODEL_PREFIX}{name}", tensor

    with partial_directory(directory) as work:
        write_model_config(work, model_config)
        written = write_shards(work, checked(), max_bytes=SHARD_BYTES, metadata={"format": "pt"})
        missing = [name for name in shapes if f"{MODEL_PREFIX}{name}" not in written.files]
        if missing:
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more parameters are missing")
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, work / "tokenizer")
        write_manifest(work, written.digests, details)
    return written


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, and where it came from."""

    model: Phi
    config: Model
    tokenizer_dir: Path | None
    """Directory with a tokenizer.json, where one is known."""
    source: Path
    """The checkpoint or Hugging Face directory that was read."""


ModelWeights = CheckpointWeights | HuggingFaceWeights


def open_weights(source: Path) -> ModelWeights:
    """Open a directory that `resolve_model` returned, as a mapping by our parameter names."""
    return CheckpointWeights(source) if is_checkpoint(source) else HuggingFaceWeights(source)


def load_model(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> LoadedModel:
    """Load MODEL for inference: evaluation mode, no gradients.

    Args:
        path: what `resolve_model` takes.
        device: where the parameters go.
        dtype: format of the parameters and the computation.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: see `resolve_model`, `CheckpointWeights`
            and `HuggingFaceWeights`.
    """
    return load_source(resolve_model(path), device=device, dtype=dtype)


def load_source(source: Path, *, device: torch.device | str, dtype: torch.dtype) -> LoadedModel:
    """Like `load_model`, of a directory that `resolve_model` returned: it is not verified again."""
    weights = open_weights(source)
    with torch.device("meta"):
        model = Phi(weights.config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        tensor = weights[name]
        converted = tensor.to(dtype)
        if overflows(tensor, converted):
            raise ValueError(f"{source}: {name} is too large for {dtype}; use bf16 or fp32")
        parameter.copy_(converted)
    return LoadedModel(model, weights.config, find_tokenizer(source), source)
