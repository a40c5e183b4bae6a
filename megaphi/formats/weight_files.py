"""Safetensors files written from a stream of tensors, one tensor in memory at a time.

A large conversion can be killed and started again. It works in `OUT.partial/` beside its result:

    lock              held while a process works there
    conversion.json   what is being converted, and how; work for anything else is thrown away
    records/          for every finished file of tensors its size, SHA-256 and tensors
    content/          what becomes OUT, by one rename

A file counts as finished when its record is there, names the same tensors, and its SHA-256 still
fits; then neither its tensors are read again nor is it written again.
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.durable import write_durably
from megaphi.errors import RunError
from megaphi.formats.files import FLOAT_DTYPES, read_json_object
from megaphi.formats.large_file import LargeFile
from megaphi.formats.manifest import FileDigest, digest_file, publish

_STORED_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_IDENTITY_NAME = "conversion.json"
_WORK_NAMES = {"lock", _IDENTITY_NAME, f"{_IDENTITY_NAME}.tmp", "records", "content"}


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

    The library wants all tensors in memory at once; here it is one at a time, and the next one is
    read while the last is hashed and written. Wider numbers come first, which keeps every tensor
    aligned.

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
    with LargeFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].read()
            assert tuple(data.shape) == tensors[name].shape, name
            assert data.dtype == tensors[name].dtype, name
            file.write(raw_bytes(data))
    return file.digest


@dataclass
class WorkDirectory:
    """The place of a conversion in progress, see the module's docstring."""

    path: Path
    """`OUT.partial`."""
    reused: list[str] = field(default_factory=list)
    """Files that an earlier, killed attempt had finished."""

    @property
    def content(self) -> Path:
        """The directory that is going to be published."""
        return self.path / "content"

    def finished(self, path: Path, names: list[str]) -> FileDigest | None:
        """The digest of a file of `content` that is there already, whole, with these tensors."""
        record_path = self.path / "records" / f"{path.name}.json"
        if not record_path.is_file() or not path.is_file():
            return None
        record = read_json_object(record_path)
        digest = FileDigest(int(record["bytes"]), str(record["sha256"]))
        if record["tensors"] != names or digest_file(path) != digest:
            return None
        self.reused.append(path.name)
        return digest

    def record(self, path: Path, names: list[str], digest: FileDigest) -> None:
        """Note that a file, which is on the disk, is finished."""
        values = {**asdict(digest), "tensors": names}
        write_durably(self.path / "records" / f"{path.name}.json", json.dumps(values))


@contextmanager
def new_directory(
    final: Path, identity: Mapping[str, Any] | None = None
) -> Iterator[WorkDirectory]:
    """Context of a directory that appears under its final name only when the block succeeds.

    At the block's end every file is synced and the directory renamed. After an exception the work
    is removed; after a kill it stays for the next call with the same `identity`.

    Args:
        final: the directory; it may exist only if it is empty.
        identity: what decides the content (JSON values); without it nothing is used again.

    Raises:
        ValueError: the final name, or that of the work directory, is taken.
        RunError: another process is at it.
    """
    require_free(final)
    work = WorkDirectory(final.with_name(f"{final.name}.partial"))
    if work.path.exists():
        strangers = (
            {path.name for path in work.path.iterdir()} - _WORK_NAMES
            if work.path.is_dir()
            else {work.path.name}
        )
        if strangers:
            raise ValueError(
                f"{work.path}: is needed for work in progress, but holds {min(strangers)}; move it"
            )
    work.path.mkdir(parents=True, exist_ok=True)
    with (work.path / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{work.path}: another process is writing {final.name}") from None
        _prepare(work, identity)
        try:
            yield work
            if final.exists():
                final.rmdir()
            publish(work.content, final)
        except Exception:
            shutil.rmtree(work.path)
            raise
        shutil.rmtree(work.path)


def _prepare(work: WorkDirectory, identity: Mapping[str, Any] | None) -> None:
    """Keep what was done for the same identity, and nothing else."""
    path = work.path / _IDENTITY_NAME
    wanted = json.dumps(identity, sort_keys=True)
    same = identity is not None and path.is_file() and path.read_text(encoding="utf-8") == wanted
    if not same:
        for name in ("records", "content"):
            shutil.rmtree(work.path / name, ignore_errors=True)
        write_durably(path, wanted)
    for name in ("records", "content"):
        (work.path / name).mkdir(exist_ok=True)
    # small files are cheap to write again, half of one must not stay
    for found in work.content.iterdir():
        if found.is_dir():
            shutil.rmtree(found)
        elif not (work.path / "records" / f"{found.name}.json").is_file():
            found.unlink()


def require_free(final: Path) -> None:
    """Raise a `ValueError` if a name is taken by anything but an empty directory."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise ValueError(f"{final}: already exists; name a new or an empty directory")


@dataclass(frozen=True)
class WrittenShards:
    """What `write_shards` wrote."""

    files: dict[str, str]
    """File name of each tensor."""
    bytes: int
    """Data bytes of all tensors together."""
    digests: dict[str, FileDigest]
    """Size and SHA-256 of each file."""
    reused: int = 0
    """Files that were there already from an attempt that was killed."""


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor | PendingTensor]],
    *,
    max_bytes: int,
    metadata: Mapping[str, str],
    work: WorkDirectory | None = None,
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
        work: remembers finished files, and knows those of an attempt that was killed.
    """
    groups: list[tuple[list[str], FileDigest]] = []
    waiting: dict[str, PendingTensor] = {}
    waiting_bytes = total_bytes = 0

    def finish() -> None:
        path = _part_path(directory, len(groups))
        names = list(waiting)
        digest = work.finished(path, names) if work is not None else None
        if digest is None:
            digest = write_safetensors(path, waiting, metadata)
            if work is not None:
                work.record(path, names, digest)
        groups.append((names, digest))

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
    return WrittenShards(files, total_bytes, digests, len(work.reused) if work is not None else 0)


def _part_path(directory: Path, index: int) -> Path:
    """Name of a file while the number of files is not known yet."""
    return directory / f"part-{index:05d}.safetensors.tmp"
