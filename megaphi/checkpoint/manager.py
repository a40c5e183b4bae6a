"""Saving, finding, verifying and dropping the checkpoints of a run.

Save: every process writes its shards into a hidden directory and hashes the bytes as they pass;
main adds the small files and the manifest and renames the directory; the new checkpoint is read
back and verified before an old one is dropped. Load: the newest checkpoint that verifies is used,
a damaged one is set aside with a message, and if none is left the run stops: it never starts from
random weights by accident.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from megaphi.checkpoint.manifest import (
    CheckpointError,
    FileDigest,
    check_strangers,
    checkpoint_name,
    find_checkpoints,
    publish,
    read_manifest,
    remove,
    verify_files,
    write_manifest,
)
from megaphi.checkpoint.tokenizer_files import copy_tokenizer
from megaphi.checkpoint.weights import write_model_config
from megaphi.config import Recipe
from megaphi.durable import sync, write_durably
from megaphi.errors import RunError
from megaphi.parallel.mesh import Mesh

# One safetensors file is built in memory before it is written.
MAX_FILE_BYTES = 1 << 30


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
        return int(self._file.write(block))

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


class CheckpointManager:
    """The checkpoints of one run directory, seen from one process of the run."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.run_dir = Path(recipe.train.run_dir)
        self._protected: Path | None = None
        self._lock: IO[str] | None = None
        self._on_main(self._claim)

    def _claim(self) -> None:
        """Create the run directory and make sure that no other run is using it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self.run_dir / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.run_dir}: another process is training into it") from None
        # what a killed save or a killed deletion left behind; neither was ever a checkpoint
        for pattern in (".step-*.tmp", "step-*.deleted"):
            for path in self.run_dir.glob(pattern):
                shutil.rmtree(path)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on main; its result, or its error, on every process."""
        result: Any = None
        error: Exception | None = None
        if self.mesh.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        result, error = self.mesh.from_main((result, error))
        if error is not None:
            raise error
        return result

    def save(self, step: int, tensors: dict[str, Tensor], trainer_state: dict[str, Any]) -> Path:
        """Publish a checkpoint of `step`, verify it, and drop those that are too old.

        Args:
            step: optimizer step that the state belongs to.
            tensors: model and optimizer tensors by checkpoint name; DTensors or equal everywhere.
            trainer_state: small values, stored as JSON.

        Raises:
            CheckpointError: it could not be written (the cause is named) or does not verify.
        """
        final = self.run_dir / checkpoint_name(step)
        temporary = self.run_dir / f".{final.name}.tmp"
        self._on_main(lambda: self._start(temporary))
        digests = self._write_tensors(temporary, tensors)
        self._on_main(lambda: self._finish(temporary, final, step, digests, trainer_state))
        problem = self._verify(final)
        if problem is not None:
            raise CheckpointError(f"the checkpoint just written does not verify: {problem}")
        self._on_main(lambda: self._drop_old(final))
        return final

    @staticmethod
    def _start(temporary: Path) -> None:
        """Make an empty hidden directory; one that a killed save left behind is dropped."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _write_tensors(self, directory: Path, tensors: dict[str, Tensor]) -> dict[str, FileDigest]:
        """Write this process's shards; return the digests of all processes' files."""
        # under pipeline parallelism a process knows its own tensors only
        own = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        sizes = {name: size for part in self.mesh.gather(own) for name, size in part.items()}
        writer = dcp.HuggingFaceStorageWriter(
            str(directory),
            fqn_to_index_mapping=_file_numbers(sizes, self.mesh.axis_size("data")),
            save_distributed=True,
        )
        files = _HashingFileSystem()
        writer.fs = files
        problem = None
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.mesh.control)
        except (dcp.api.CheckpointException, OSError) as error:
            causes = getattr(error, "failures", {})
            problem = str(next(iter(causes.values()))[0]) if causes else str(error)
        problems, parts = zip(*self.mesh.gather((problem, files.digests)), strict=True)
        failed = next((text for text in problems if text is not None), None)
        if failed is not None:
            if self.mesh.is_main:
                shutil.rmtree(directory, ignore_errors=True)
            raise CheckpointError(f"{directory}: could not be written: {failed}")
        return {name: digest for part in parts for name, digest in part.items()}

    def _finish(
        self,
        temporary: Path,
        final: Path,
        step: int,
        digests: dict[str, FileDigest],
        trainer_state: dict[str, Any],
    ) -> None:
        """Add the small files and the manifest, and publish."""
        write_model_config(temporary, self.recipe.model)
        (temporary / "trainer.json").write_text(
            json.dumps(trainer_state, indent=1), encoding="utf-8"
        )
        (temporary / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        tokenizer = self.run_dir / "tokenizer"
        if tokenizer.is_dir():
            copy_tokenizer(tokenizer, temporary / "tokenizer")
        write_manifest(temporary, digests, {"step": step, "processes": self.mesh.size})
        publish(temporary, final)
        write_durably(self.run_dir / "latest", final.name + "\n")

    def _drop_old(self, newest: Path) -> None:
        """Delete what is beyond `keep`, sparing permanent steps and the one resumed from."""
        permanent = self.recipe.checkpoint.permanent_interval
        others = [path for path in find_checkpoints(self.run_dir) if path != newest]
        for path in others[self.recipe.checkpoint.keep - 1 :]:
            step = int(path.name.removeprefix("step-"))
            if path != self._protected and not (permanent and step % permanent == 0):
                remove(path)

    def _verify(self, directory: Path) -> str | None:
        """Verify a checkpoint, each process a share of the files; the problem, or None."""
        problem = None
        try:
            manifest = read_manifest(directory)
            check_strangers(directory, manifest)
            names = sorted(manifest["files"])
            verify_files(directory, manifest, names[self.mesh.rank :: self.mesh.size])
        except (CheckpointError, OSError) as error:
            problem = str(error)
        return next((text for text in self.mesh.gather(problem) if text is not None), None)

    def find(self) -> Path | None:
        """The verified checkpoint that the recipe says to resume from; None for a new run.

        With `auto`, damaged checkpoints are renamed to `….corrupt-N` and the one before is tried.

        Raises:
            ValueError: `never` in a directory that has checkpoints, or a path that is none.
            CheckpointError: checkpoints exist, but none verifies.
        """
        resume = self.recipe.checkpoint.resume
        names = self.mesh.from_main([str(path) for path in find_checkpoints(self.run_dir)])
        candidates = [Path(name) for name in names]
        if resume == "never":
            if candidates:
                raise ValueError(
                    f"{self.run_dir} already has checkpoints and checkpoint.resume=never; choose "
                    "another train.run_dir, or resume with checkpoint.resume=auto"
                )
            return None
        if resume != "auto":
            return self._find_named(Path(resume), candidates)
        for path in candidates:
            problem = self._verify(path)
            if problem is None:
                return path
            aside = self._on_main(partial(_set_aside, path))
            if self.mesh.is_main:
                message = f"megaphi: damaged checkpoint: {problem}; set aside as {aside}"
                print(message, file=sys.stderr, flush=True)
        damaged = self.mesh.from_main([str(path) for path in self.run_dir.glob("step-*.corrupt-*")])
        if damaged:
            raise CheckpointError(
                f"{self.run_dir}: none of its checkpoints verifies; refusing to start from random "
                "weights. Restore one, or choose another train.run_dir"
            )
        return None

    def _find_named(self, path: Path, own: list[Path]) -> Path:
        """Verify the checkpoint that the user named."""
        if not path.is_dir():
            raise ValueError(f"checkpoint.resume={path}: no such checkpoint directory")
        if own and own[0].name > path.name:
            raise ValueError(
                f"checkpoint.resume={path} is older than {own[0]}; choose another train.run_dir, "
                "so that nothing is overwritten"
            )
        problem = self._verify(path)
        if problem is not None:
            raise CheckpointError(problem)
        return path

    def load(
        self, directory: Path, tensors_of: Callable[[dict[str, Any]], dict[str, Tensor]]
    ) -> dict[str, Any]:
        """Fill tensors in place from a verified checkpoint, whatever layout wrote it.

        Args:
            directory: the checkpoint.
            tensors_of: from the trainer state to the tensors to fill, by checkpoint name.

        Returns:
            The trainer state that was saved with it.

        Raises:
            CheckpointError: the checkpoint has no trainer state or lacks a tensor.
        """
        path = directory / "trainer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} holds weights only; start from it with checkpoint.initialize_from"
            )
        self._protected = directory
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        reader = dcp.HuggingFaceStorageReader(str(directory))
        try:
            dcp.load(tensors_of(state), storage_reader=reader, process_group=self.mesh.control)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{directory}: does not fit this model: {cause}") from error
        return state


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to the first free `….corrupt-N`."""
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
    sync(aside.parent)
    return aside
