"""Saving, finding, verifying and dropping the checkpoints of a run.

Save: every process writes its shards into a hidden directory and hashes the bytes as they pass;
main adds the small files and the manifest and renames the directory; the new checkpoint is read
back and verified before `latest` names it and an old one is dropped. All of this may happen on a
thread, from a snapshot, while training continues: one save at a time, and the next waits for it.
Load: the newest checkpoint that verifies is used, a damaged one is set aside with a message, and
if none is left the run stops: it never starts from random weights by accident. What is there, and
what it says, is for main alone to decide: another host may see the directory a little later.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from megaphi.checkpoint.shards import write_tensors
from megaphi.checkpoint.staging import Background, Staging
from megaphi.config import Recipe
from megaphi.device import is_gpu
from megaphi.durable import (
    make_directory,
    open_locked,
    publish_directory,
    rename_durably,
    write_durably,
)
from megaphi.errors import RunError
from megaphi.formats.manifest import (
    DELETED_PATTERN,
    CheckpointError,
    FileDigest,
    check_name,
    check_unlisted,
    checkpoint_name,
    delete_leftovers,
    find_checkpoints,
    read_manifest,
    remove,
    verify_checkpoint,
    verify_files,
    write_manifest,
)
from megaphi.formats.tokenizer_files import copy_tokenizer
from megaphi.formats.weights import write_model_config
from megaphi.parallel.mesh import Mesh


class CheckpointManager:
    """The checkpoints of one run directory, seen from one process of the run."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.run_dir = Path(recipe.train.run_dir)
        asynchronous = recipe.checkpoint.asynchronous
        self.asynchronous = is_gpu(mesh.device) if asynchronous == "auto" else bool(asynchronous)
        self._background = Background(mesh.device)
        self._staging: Staging | None = None
        self._has_told = False
        self._protected: Path | None = None
        self._lock: FileIO | None = None
        self.mesh.on_main(self._claim)

    def _claim(self) -> None:
        """Create the run directory and make sure that no other run is using it.

        Raises:
            ValueError: another run is, or something that is no directory has its name.
        """
        try:
            make_directory(self.run_dir)
        except FileExistsError:
            raise ValueError(
                f"{self.run_dir}: a file, or a link that leads nowhere; choose another "
                "train.run_dir"
            ) from None
        try:
            self._lock = open_locked(self.run_dir / ".lock")
        except BlockingIOError:
            # a wrong call, and not a failed run: that, a launcher would start again
            raise ValueError(
                f"{self.run_dir}: another process is training into it; end that one, or choose "
                "another train.run_dir"
            ) from None
        except OSError as error:  # Lustre without `-o flock`, some NFS mounts
            print(
                f"megaphi: {self.run_dir}: its file system has no locks ({error}); see to it that "
                "no other run uses this directory",
                file=sys.stderr,
                flush=True,
            )
        # what a killed save or a killed deletion left behind; neither was ever a checkpoint
        for pattern in (".step-*.tmp", DELETED_PATTERN):
            for path in self.run_dir.glob(pattern):
                delete_leftovers(path)

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Allocate what saving in the background needs, where the recipe asks for that.

        Args:
            tensors: those that `save` will get; their shapes stay.

        Raises:
            RunError: there is not enough host memory.
        """
        if self.asynchronous:
            self._staging = Staging(tensors, self.mesh.device)

    def describe(self) -> str:
        """How checkpoints are written, for the log."""
        if self._staging is None:
            return "checkpoints: training waits until they are written"
        size = self._staging.bytes / 2**30
        return f"checkpoints: written in the background from a snapshot, {size:.2f} GiB a process"

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this process; `wait` raises the error."""
        return self._background.failed

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: it failed; the checkpoints before it are all there.
        """
        self._background.wait()

    def close(self) -> None:
        """Let a save in the background finish and give the run directory free.

        An error of that save is only printed: another one is ending the run.
        """
        try:
            self._background.wait()
        except Exception as error:
            print(f"megaphi: the last checkpoint failed: {error}", file=sys.stderr, flush=True)
        self._background.close()
        if self._lock is not None:
            self._lock.close()

    def save(self, step: int, tensors: dict[str, Tensor], trainer_state: dict[str, Any]) -> None:
        """Publish a checkpoint of `step`, verify it, and drop those that are too old.

        In the background, after `prepare` and where the recipe asks for it: then the tensors may
        change as soon as this returns, and an error is raised by `wait` or by the next save.

        Args:
            step: optimizer step that the state belongs to.
            tensors: model and optimizer tensors by checkpoint name; DTensors or equal everywhere.
            trainer_state: small values, stored as JSON.

        Raises:
            CheckpointError: it could not be written (the cause is named) or does not verify; or
                the save before could not.
        """
        self._wait_for_turn(step)
        job = partial(self._save, step, tensors, json.dumps(trainer_state, indent=1))
        if self._staging is None:
            job()
        else:
            self._staging.take(tensors)
            self._background.start(job)

    def _wait_for_turn(self, step: int) -> None:
        """Wait for the save before, if one is in flight; say so the first time."""
        late, began = self._background.busy, time.perf_counter()
        self._background.wait()
        if late and self.mesh.is_main and not self._has_told:
            self._has_told = True
            print(
                f"megaphi: the save of step {step} waited {time.perf_counter() - began:.1f} s for "
                "the one before to be written; a larger checkpoint.interval avoids this "
                "(reported once)",
                file=sys.stderr,
                flush=True,
            )

    def _save(self, step: int, tensors: dict[str, Tensor], trainer_state: str) -> None:
        """Write, publish and verify; all processes fail together, whichever has the problem."""
        final = self.run_dir / checkpoint_name(step)
        temporary = self.run_dir / f".{final.name}.tmp"
        self.mesh.on_main(lambda: self._start(temporary, final))
        planner = None if self._staging is None else self._staging.planner()
        digests = write_tensors(temporary, tensors, planner, self.mesh)
        self.mesh.on_main(lambda: self._finish(temporary, final, step, digests, trainer_state))
        problem = self._verify(final)
        if problem is not None:
            raise CheckpointError(f"the checkpoint just written does not verify: {problem}")
        self.mesh.on_main(lambda: self._make_latest(final))

    @staticmethod
    def _start(temporary: Path, final: Path) -> None:
        """Make an empty hidden directory; one that a failed save left behind is dropped."""
        with _named(f"{final}: could not be written"):
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()

    def _finish(
        self,
        temporary: Path,
        final: Path,
        step: int,
        digests: dict[str, FileDigest],
        trainer_state: str,
    ) -> None:
        """Add the small files and the manifest, and publish; or drop the directory."""
        try:
            with _named(f"{final}: could not be written"):
                write_model_config(temporary, self.recipe.model)
                (temporary / "trainer.json").write_text(trainer_state, encoding="utf-8")
                (temporary / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
                tokenizer = self.run_dir / "tokenizer"
                if tokenizer.is_dir():
                    copy_tokenizer(tokenizer, temporary / "tokenizer")
                write_manifest(temporary, digests, {"step": step, "processes": self.mesh.size})
                publish_directory(temporary, final)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_latest(self, newest: Path) -> None:
        """Name a verified checkpoint in `latest` and delete what is beyond `keep`.

        Permanent steps and the checkpoint that the run resumed from are spared.
        """
        with _named(f"{newest} is complete, but {self.run_dir / 'latest'} could not be written"):
            write_durably(self.run_dir / "latest", newest.name + "\n")
        for path in self.run_dir.glob(DELETED_PATTERN):
            delete_leftovers(path)
        permanent = self.recipe.checkpoint.permanent_interval
        others = [path for path in find_checkpoints(self.run_dir) if path != newest]
        for path in others[self.recipe.checkpoint.keep - 1 :]:
            step = int(path.name.removeprefix("step-"))
            if path != self._protected and not (permanent and step % permanent == 0):
                with _named(f"{newest} is complete, but {path} could not be deleted"):
                    remove(path)

    def _verify(self, directory: Path) -> str | None:
        """Verify a checkpoint, each process a share of the files; the problem, or None."""
        problem = None
        try:
            manifest = read_manifest(directory)
            check_name(directory, manifest)
            check_unlisted(directory, manifest)
            names = sorted(manifest["files"])
            verify_files(directory, manifest, names[self.mesh.rank :: self.mesh.size])
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{directory}: {error}"
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
            aside = self.mesh.on_main(partial(_set_aside, path, problem))
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
        if not self.mesh.on_main(path.is_dir):
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
        self._protected = directory
        state: dict[str, Any] = self.mesh.on_main(partial(_read_trainer_state, directory))
        reader = dcp.HuggingFaceStorageReader(str(directory))
        try:
            dcp.load(tensors_of(state), storage_reader=reader, process_group=self.mesh.control)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{directory}: does not fit this model: {cause}") from error
        return state


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn an error of the file system, which may not say where, into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


def _read_trainer_state(directory: Path) -> Any:
    """The trainer's part of a verified checkpoint."""
    path = directory / "trainer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds weights only; start from it with checkpoint.initialize_from"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _set_aside(path: Path, problem: str) -> Path:
    """Rename a checkpoint in which a process found a problem to the first free `….corrupt-N`.

    Raises:
        RunError: this process finds nothing wrong with it; it stays where it is.
    """
    with contextlib.suppress(CheckpointError, OSError):
        verify_checkpoint(path)
        raise RunError(
            f"{problem}; but process 0 finds this checkpoint sound. Do all hosts see the same "
            "files? Nothing was changed; run me again"
        )
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    rename_durably(path, aside)
    return aside
