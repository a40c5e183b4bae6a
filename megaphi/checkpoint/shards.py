"""The tensors of a checkpoint on their way to the disk: which file, which digest, who failed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem

from megaphi.formats.manifest import CheckpointError, FileDigest
from megaphi.parallel.mesh import Mesh

# One safetensors file is built in memory before it is written, during half a second a GiB of which
# the library lets no other Python thread run.
MAX_FILE_BYTES = 1 << 28


class _HashingStream:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, block: bytes) -> int:
        """Write and hash a block."""
        self._digest.update(block)
        self._size += len(block)
        written = int(self._file.write(block))
        # torch syncs the file without this, and another host cannot sync what waits here
        self._file.flush()
        return written

    def result(self) -> FileDigest:
        """Size and SHA-256 of all that was written."""
        return FileDigest(self._size, self._digest.hexdigest())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _HashingFileSystem(FileSystem):
    """torch.distributed.checkpoint's file system, remembering the digest of every file."""

    def __init__(self) -> None:
        super().__init__()
        self.digests: dict[str, FileDigest] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; what is written to it is hashed."""
        with super().create_stream(path, mode) as file:
            if "w" not in mode:
                yield file
                return
            stream = _HashingStream(file)
            yield stream
            self.digests[Path(path).name] = stream.result()


def _file_numbers(sizes: Mapping[str, int], num_processes: int) -> dict[str, int]:
    """Assign each tensor to a numbered file so that a process's files stay under the limit.

    `sizes` are the bytes of all tensors of the run by name.
    """
    numbers, number, used = {}, 1, 0
    for name, whole in sizes.items():
        size = whole // num_processes
        if used and used + size > MAX_FILE_BYTES:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    return numbers


def write_tensors(
    directory: Path, tensors: dict[str, Tensor], planner: SavePlanner | None, mesh: Mesh
) -> dict[str, FileDigest]:
    """Write this process's shards into an existing directory, which is dropped if any fails.

    Args:
        directory: where all processes write.
        tensors: by checkpoint name; DTensors or equal everywhere.
        planner: where the data comes from, if not from the tensors.
        mesh: the processes, which all call this.

    Returns:
        Size and SHA-256 of all processes' files, by name.

    Raises:
        CheckpointError: a process could not write; all raise it, and it names the cause.
    """
    # under pipeline parallelism a process knows its own tensors only
    own = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    sizes = {name: size for part in mesh.gather(own) for name, size in part.items()}
    writer = dcp.HuggingFaceStorageWriter(
        str(directory),
        fqn_to_index_mapping=_file_numbers(sizes, mesh.size // mesh.axis_size("pipeline")),
        save_distributed=True,
    )
    files = _HashingFileSystem()
    writer.fs = files
    problem = None
    try:
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=planner,
            process_group=mesh.control,
        )
    except (dcp.api.CheckpointException, OSError) as error:
        causes = getattr(error, "failures", {})
        rank, cause = next(((r, c[0]) for r, c in causes.items()), (mesh.rank, error))
        problem = f"by process {rank}: {cause}"
    problems, parts = zip(*mesh.gather((problem, files.digests)), strict=True)
    failed = next((text for text in problems if text is not None), None)
    if failed is not None:
        if mesh.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(f"{directory}: could not be written {failed}")
    return {name: digest for part in parts for name, digest in part.items()}
