"""Safetensors and JSON files: read with suspicion, written piece by piece.

A model file may come from anybody. Everything here reads headers before data, opens files by plain
names inside one directory, and never unpickles. The safetensors library itself refuses headers
that are too large, overlap, leave gaps or run past the end of the file.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.checkpoint.manifest import CheckpointError, publish

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor (or one shard of it) in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of the format: F32, BF16, F16, I64, …"""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating-point format.

        Raises:
            CheckpointError: the file holds another kind of number.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.path}: {self.name} is {self.dtype}, a weight must be one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        return FLOAT_DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The data, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error}") from error
        return tensor


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """List the tensors of a safetensors file, and its metadata; no data is read.

    Raises:
        CheckpointError: the file is missing or not a sound safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            entries = []
            for name in file.keys():  # noqa: SIM118 (not a mapping: it has no __iter__)
                piece = file.get_slice(name)
                entries.append(
                    StoredTensor(path, name, tuple(piece.get_shape()), piece.get_dtype())
                )
            return entries, dict(file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: the file is missing, too large, not JSON, nested too deeply or not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large to be what it should be")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


@dataclass(frozen=True)
class WrittenShards:
    """What `write_shards` wrote."""

    files: dict[str, str]
    """File name of each tensor."""
    bytes: int
    """Data bytes of all tensors together."""


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_bytes: int,
    metadata: Mapping[str, str],
) -> WrittenShards:
    """Write a stream of tensors into safetensors files of at most `max_bytes` data bytes each.

    Only one file's tensors are in memory at a time; a tensor larger than the limit has a file of
    its own. One file is called `model.safetensors`, several `model-00001-of-00003.safetensors`,
    the names that Hugging Face uses.

    Args:
        directory: an existing directory.
        tensors: names, each once, and values.
        max_bytes: limit of one file's data.
        metadata: strings for the header of every file.
    """
    groups: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    waiting_bytes = total_bytes = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and waiting_bytes + size > max_bytes:
            groups.append(_write_part(directory, len(groups), waiting, metadata))
            waiting, waiting_bytes = {}, 0
        waiting[name] = tensor
        waiting_bytes += size
        total_bytes += size
    groups.append(_write_part(directory, len(groups), waiting, metadata))
    files = {}
    for index, names in enumerate(groups):
        final = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        _part_path(directory, index).rename(directory / final)
        files.update(dict.fromkeys(names, final))
    return WrittenShards(files, total_bytes)


def _part_path(directory: Path, index: int) -> Path:
    """Name of a file while the number of files is not known yet."""
    return directory / f"part-{index:05d}.safetensors.tmp"


def _write_part(
    directory: Path, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[str]:
    """Write one file and return the names in it."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, _part_path(directory, index), metadata=dict(metadata))
    return list(tensors)


def require_free(final: Path) -> None:
    """Raise a `ValueError` if a name is taken by anything but an empty directory."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"{final}: already exists; name a new or an empty directory")


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Context of a directory that appears under its final name only when the block succeeds.

    The block gets a temporary directory beside the final one. At its end every file is synced and
    the directory renamed; after an exception it is removed.

    Raises:
        ValueError: the final name is taken by anything but an empty directory.
    """
    require_free(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        if final.exists():
            final.rmdir()
        publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number.

    Raises:
        ValueError: the text is none of these or not positive.
    """
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    unit = next(
        (unit for unit in sorted(units, key=len, reverse=True) if lowered.endswith(unit)), ""
    )
    number = lowered.removesuffix(unit).strip()
    try:
        size = float(number) * units.get(unit, 1)
    except ValueError:
        size = math.nan
    if not 1 <= size < 2**63:
        raise ValueError(f"size {text!r} is not understood; write for instance 5GB, 200MB or 1GiB")
    return int(size)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, format and bits (NaN equals the same NaN)."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.contiguous().view(-1).view(torch.uint8),
            second.contiguous().view(-1).view(torch.uint8),
        )
    )
