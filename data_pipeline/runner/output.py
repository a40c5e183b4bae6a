"""Records directories on disk: built aside, described by a manifest, published by one rename.

A stage that writes DIR works in `DIR.partial`, which is locked against a second process. Each
shard of the work is written to a directory of its attempt, which is renamed once it is done, so
that a killed stage, started again with the same inputs and configuration, keeps the finished shards
and redoes the others. At the end the shards' files are numbered through, `manifest.json` is written
last, and the directory is renamed to DIR: whatever has that name is complete.

A shard may be worked on twice at a time: a machine that is taken for lost can still be writing
while its shards are redone elsewhere. Attempts never share a directory, the first that is done is
taken, and before anything is published the folder of the shards is moved away in one step, so that
nothing a straggler writes can end up in the output.
"""

import errno
import json
import os
import shutil
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from data_pipeline.records.record import Json, digest
from megaphi.durable import file_sha256, open_locked, rename_durably, sync, write_durably
from megaphi.errors import RunError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = "lock"
PLAN_NAME = "plan"
RESULT_NAME = "result.json"
SHARDS_NAME = "shards"
VISIBLE_SECONDS = 120  # Linux keeps what it knows of an NFS folder for up to 60 s


class OtherOutput(ValueError):
    """The name is taken by a finished output of other inputs or options (exit 2)."""


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One file of a records directory: its name, number of lines, size and SHA-256."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage did, kept as `manifest.json` alongside its output.

    Attributes:
        stage: name of the stage.
        version: version of its code; raised when the same input would give another output.
        config: every option that the output depends on.
        seed: seed of a stage that draws, else None.
        inputs: per source `{"path", "files", "bytes", "sha256"}`.
        records_in: documents read.
        records_out: documents kept.
        rejected: documents refused, by reason; in = out + rejected.
        text_bytes: bytes of the kept texts, UTF-8.
        notes: what the stage changed in every text, in words.
        parts: the part files, in order.
        rejects: the rejects files, in order.
        run: what differs from run to run: seconds, workers, library versions.
    """

    stage: str
    version: str
    config: dict[str, Json]
    seed: int | None
    inputs: list[dict[str, Json]]
    records_in: int
    records_out: int
    rejected: dict[str, int]
    text_bytes: int
    notes: list[str]
    parts: list[PartFile]
    rejects: list[PartFile]
    run: dict[str, Json] = field(default_factory=dict)

    @property
    def records_sha256(self) -> str:
        """Digest of the kept records: equal when the part files are."""
        return digest([[part.name, part.bytes, part.sha256] for part in self.parts])

    @property
    def key(self) -> str:
        """Digest of what determines the output: stage, version, config, seed and inputs."""
        return stage_key(self.stage, self.version, self.config, self.seed, self.inputs)

    @property
    def num_rejected(self) -> int:
        """Documents refused, all reasons together."""
        return sum(self.rejected.values())


def stage_key(
    stage: str, version: str, config: Json, seed: int | None, inputs: list[dict[str, Json]]
) -> str:
    """Digest of what determines a stage's output; the path of an input does not count."""
    contents = [{k: v for k, v in entry.items() if k != "path"} for entry in inputs]
    return digest([stage, version, config, seed, contents])


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a records directory.

    Raises:
        FileNotFoundError: there is no such directory, or no manifest in it.
        RunError: the manifest cannot be read, or a part file is missing or has another size.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: not a records directory (it has no {MANIFEST_NAME}); "
            "make one with `megaphi data ingest`"
        )
    try:
        raw = json.loads(path.read_bytes())
        del raw["records_sha256"]
        raw["parts"] = [PartFile(**part) for part in raw["parts"]]
        raw["rejects"] = [PartFile(**part) for part in raw["rejects"]]
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: not a manifest ({error}); rebuild the records") from None
    for part in manifest.parts:
        file = directory / part.name
        if not file.is_file() or file.stat().st_size != part.bytes:
            raise RunError(f"{file}: missing or not {part.bytes} bytes long; rebuild the records")
    return manifest


def check_target(path: Path) -> None:
    """Check that a name is free for a records directory: absent, empty, or holding an older one.

    Raises:
        ValueError: something else has that name.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: is not a directory; choose another `out`")
    if path.is_dir() and not (path / MANIFEST_NAME).is_file() and any(path.iterdir()):
        raise ValueError(f"{path}: holds files that no stage made; choose another `out`")


def is_made(path: Path, sha256: str, what: str, *, overwrite: bool) -> bool:
    """Whether a file that is to be made is there already.

    Args:
        path: of the file.
        sha256: of the content that it will have.
        what: names it in a message.
        overwrite: a file of other content may be replaced.

    Raises:
        OtherOutput: it may not.
    """
    there = path.exists()
    same = there and file_sha256(path) == sha256
    if there and not same and not overwrite:
        raise OtherOutput(
            f"{path}: is another file than this {what}; choose another `out`, or set `overwrite` "
            "to replace it"
        )
    return same


def check_part(directory: Path, part: PartFile) -> Path:
    """Return the path of a part file whose content is the one in the manifest.

    Raises:
        RunError: the content is another one.
    """
    path = directory / part.name
    if file_sha256(path) != part.sha256:
        raise RunError(f"{path}: differs from its manifest (SHA-256); rebuild the records")
    return path


def write_json(path: Path, value: Json) -> None:
    """Write a JSON file durably and in one step."""
    write_durably(path, json.dumps(value, indent=1) + "\n")


class WorkDirectory:
    """A locked directory in which one run builds its output; finished shards survive a kill.

    Args:
        path: the directory, created when missing.
        plan: digest of what is being built. A directory left by a killed run of the same plan is
            taken over (`resumed` is true), one of any other plan is emptied.
        shared: work on some shards of a plan that was begun by another process, alongside others.
            The lock is shared, and nothing is emptied.

    Raises:
        RunError: another process is working in it, or, where shared, the plan is another one.
        ValueError: there is a directory of that name that no run of ours made.
    """

    def __init__(self, path: Path, plan: str, *, shared: bool = False) -> None:
        self.path = path
        self._lock: FileIO | None = None
        plan_file = path / PLAN_NAME
        if shared:
            self._share(plan_file, plan)
            return
        path.mkdir(parents=True, exist_ok=True)
        # A run killed just before the last rename leaves a manifest and no lock.
        ours = (path / LOCK_NAME).exists() or (path / MANIFEST_NAME).exists()
        if any(path.iterdir()) and not ours:
            raise ValueError(f"{path}: in the way of the work directory; move it or change `out`")
        self._take_lock()
        self.resumed = plan_file.is_file() and plan_file.read_text(encoding="ascii") == plan
        self._clear(keep_shards=self.resumed)
        (path / SHARDS_NAME).mkdir(exist_ok=True)
        plan_file.write_text(plan, encoding="ascii")

    def _share(self, plan_file: Path, plan: str) -> None:
        """Take a shared lock on a directory in which this plan was begun."""
        self.resumed = True
        if not plan_file.is_file():
            raise RunError(f"{self.path}: nothing is planned there; submit the stage first")
        self._take_lock(shared=True)
        if plan_file.read_text(encoding="ascii") != plan:
            self.release()
            raise RunError(
                f"{self.path}: was planned from other inputs or options than this slice sees; "
                "submit the stage again"
            )

    def _take_lock(self, *, shared: bool = False) -> None:
        try:
            self._lock = open_locked(self.path / LOCK_NAME, shared=shared)
        except BlockingIOError:
            raise RunError(f"{self.path}: another process is writing there; wait for it") from None

    def _clear(self, keep_shards: bool) -> None:
        shards = self.path / SHARDS_NAME
        kept = keep_shards and shards.is_dir()
        if kept:
            for entry in shards.iterdir():
                # what is no number is an attempt that a killed run left
                if not entry.name.isdecimal() or self.finished(int(entry.name)) is None:
                    shutil.rmtree(entry)
        else:
            self._drop_shards()
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if not (kept and entry.name == SHARDS_NAME):
                    shutil.rmtree(entry)
            elif entry.name != LOCK_NAME:
                entry.unlink()

    def _drop_shards(self) -> None:
        """Remove the shards: first out of the way of processes that may still write, by name."""
        aside = self.path.with_name(self.path.name + ".done")
        if aside.exists():  # left by a run that was killed right here
            shutil.rmtree(aside)
        if (self.path / SHARDS_NAME).exists():
            (self.path / SHARDS_NAME).rename(aside)
            shutil.rmtree(aside)

    def shard_directory(self, index: int) -> Path:
        """Where shard `index` is once it is done."""
        return self.path / SHARDS_NAME / f"{index:05d}"

    def finished(self, index: int) -> dict[str, Any] | None:
        """The result that shard `index` left when it was done, or None if it is not done.

        A shard also counts as not done when a file that its result lists is gone: the run was then
        killed while it was gathering the shards' files.
        """
        directory = self.shard_directory(index)
        if not (directory / RESULT_NAME).is_file():
            return None
        result: dict[str, Any] = json.loads((directory / RESULT_NAME).read_bytes())
        files = [entry["name"] for kind in ("part", "rejected") for entry in result[kind]]
        return result if all((directory / name).is_file() for name in files) else None

    def await_shard(self, index: int) -> None:
        """Wait until a shard that was done elsewhere is seen here.

        A network file system may remember for a minute that a file was not there; listing its
        folder makes it ask again.

        Raises:
            RunError: it is not seen in time.
        """
        result = self.shard_directory(index) / RESULT_NAME
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not result.is_file():
            if time.monotonic() > deadline:
                raise RunError(
                    f"{result}: was written on another machine and is not seen here after "
                    f"{VISIBLE_SECONDS} s; the output must lie in a directory that all share"
                )
            os.listdir(result.parent.parent)
            time.sleep(0.1)

    def publish(self, target: Path) -> None:
        """Drop the work files and rename this directory to `target`, replacing an older output.

        The caller has made sure of `check_target(target)`.
        """
        self._drop_shards()
        for name in (PLAN_NAME, LOCK_NAME):
            (self.path / name).unlink()
        sync(self.path)
        if target.exists():
            old = self.path.with_name(self.path.name + ".replaced")
            if old.exists():  # left by a run that was killed right here
                shutil.rmtree(old)
            target.rename(old)
            rename_durably(self.path, target)
            shutil.rmtree(old)
        else:
            rename_durably(self.path, target)
        self.release()

    def discard(self) -> None:
        """Remove the directory, the lock last, so that a kill meanwhile leaves it as ours."""
        self._clear(keep_shards=False)
        (self.path / LOCK_NAME).unlink()
        self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Give up the lock; what was not published waits for a later run to take over."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def start_shard(directory: Path) -> Path:
    """Make a directory for an attempt at a shard; `finish_shard` gives it the shard's name.

    Args:
        directory: of the shard, see `WorkDirectory.shard_directory`.

    Raises:
        RunError: this machine does not see the work directory.
    """
    attempt = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
    try:
        attempt.mkdir()
    except FileNotFoundError:
        raise RunError(
            f"{directory.parent}: is not there on {socket.gethostname()}; several machines can "
            "only work on an output in a directory that they share, under the same path"
        ) from None
    return attempt


def finish_shard(attempt: Path, directory: Path, result: dict[str, Json]) -> dict[str, Json]:
    """Mark a shard as done; its files and its result get their place in one step.

    Args:
        attempt: as `start_shard` made it.
        directory: of the shard.
        result: what there is to say about it, with the names of its files under `part` and
            `rejected`.

    Returns:
        The result: of the attempt that was done first, which may be another one.
    """
    write_json(attempt / RESULT_NAME, result)
    try:
        attempt.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        first: dict[str, Json] = json.loads((directory / RESULT_NAME).read_bytes())
        shutil.rmtree(attempt)
        return first
    sync(directory.parent)
    return result


def number_parts(work: WorkDirectory, results: list[dict[str, Json]], kind: str) -> list[PartFile]:
    """Move the shards' files of one kind up, numbered through in shard order.

    Args:
        work: the work directory.
        results: the shards' results in order, each with a list of files under `kind`.
        kind: `part` or `rejected`.
    """
    numbered: list[PartFile] = []
    for index, result in enumerate(results):
        for entry in result[kind]:
            suffix = entry["name"].split(".", 1)[1]
            name = f"{kind}-{len(numbered):05d}.{suffix}"
            (work.shard_directory(index) / entry["name"]).rename(work.path / name)
            numbered.append(PartFile(**{**entry, "name": name}))
    return numbered


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with the digest of the records in it."""
    value = asdict(manifest) | {"records_sha256": manifest.records_sha256}
    write_json(directory / MANIFEST_NAME, value)
