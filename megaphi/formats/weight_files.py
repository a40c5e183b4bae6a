"""Safetensors files written from a stream of tensors, one tensor in memory at a time."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.durable import HashedFile
from megaphi.formats.files import FLOAT_DTYPES
from megaphi.formats.manifest import FileDigest

_STORED_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor whose shape and format are known and whose data is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns the data, on the CPU, in that shape and format."""

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def _pending(tensor: Tensor | PendingTensor) -> PendingTensor:
    """A tensor in memory as one that is read."""
    if isinstance(tensor, PendingTensor):
        return tensor
    return PendingTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row, little-endian."""
    assert sys.byteorder == "little", "safetensors and GGUF store little-endian numbers"
    array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write_safetensors(
    path: Path, tensors: Mapping[str, PendingTensor], metadata: Mapping[str, str]
) -> FileDigest:
    """Write a safetensors file, durably; the result is byte for byte what the library writes.

    The library wants all tensors in memory at once; here it is one at a time. Wider numbers come
    first, which keeps every tensor aligned.

    Args:
        path: the file.
        tensors: F32, BF16 or F16.
        metadata: strings for the header.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _STORED_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].read()
            assert tuple(data.shape) == tensors[name].shape, name
            assert data.dtype == tensors[name].dtype, name
            file.write(raw_bytes(data))
    return FileDigest(file.size, file.sha256)


@dataclass(frozen=True)
class WrittenShards:
    """What `write_shards` wrote."""

    files: dict[str, str]
    """File name of each tensor."""
    bytes: int
    """Data bytes of all tensors together."""
    digests: dict[str, FileDigest]
    """Size and SHA-256 of each file."""


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor | PendingTensor]],
    *,
    max_bytes: int,
    metadata: Mapping[str, str],
) -> WrittenShards:
    """Write a stream of tensors into safetensors files of at most `max_bytes` data bytes each.

    A tensor larger than the limit has a file of its own. One file is called `model.safetensors`,
    several `model-00001-of-00003.safetensors`, the names that Hugging Face uses. Pending tensors
    are in memory one at a time; others as long as the stream and this file hold them.

    Args:
        directory: an existing directory.
        tensors: names, each once, and values.
        max_bytes: limit of one file's data.
        metadata: strings for the header of every file.
    """
    groups: list[tuple[list[str], FileDigest]] = []
    waiting: dict[str, PendingTensor] = {}
    waiting_bytes = total_bytes = 0

    def finish() -> None:
        path = _part_path(directory, len(groups))
        groups.append((list(waiting), write_safetensors(path, waiting, metadata)))

    for name, tensor in tensors:
        pending = _pending(tensor)
        if waiting and waiting_bytes + pending.nbytes > max_bytes:
            finish()
            waiting, waiting_bytes = {}, 0
        waiting[name] = pending
        waiting_bytes += pending.nbytes
        total_bytes += pending.nbytes
    finish()
    files: dict[str, str] = {}
    digests: dict[str, FileDigest] = {}
    for index, (names, digest) in enumerate(groups):
        final = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        _part_path(directory, index).rename(directory / final)
        files.update(dict.fromkeys(names, final))
        digests[final] = digest
    return WrittenShards(files, total_bytes, digests)


def _part_path(directory: Path, index: int) -> Path:
    """Name of a file while the number of files is not known yet."""
    return directory / f"part-{index:05d}.safetensors.tmp"
