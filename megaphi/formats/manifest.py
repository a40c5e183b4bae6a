"""What makes a directory a checkpoint: a manifest that vouches for every file in it.

Layout of a checkpoint directory, `step-00001200/`:

    *.safetensors   tensors, as written by torch.distributed.checkpoint's Hugging Face storage:
                    `model.<parameter>` and, from the trainer, `optimizer.first_moment.<parameter>`
                    and `optimizer.second_moment.<parameter>`, each cut into any number of shards
    model.json      the model section of the recipe
    trainer.json    step, samples consumed, optimizer step (from the trainer)
    config.yaml     the whole recipe (from the trainer)
    tokenizer/      the tokenizer, where it is known
    manifest.json   size and SHA-256 of every file above, and a digest of itself

A directory becomes a checkpoint by one rename, after every byte is on the disk; nothing is ever
written into an existing one. Nothing that is read back is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaphi.durable import file_sha256, rename_durably, write_durably
from megaphi.errors import RunError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
DELETED_PATTERN = "step-*.deleted"
"""What `remove` has renamed and a kill, or an error, has kept from being deleted."""
_HASHED_AT_ONCE = 4
_STEP_PATTERN = re.compile(r"step-(\d{8,})")


class CheckpointError(RunError):
    """A checkpoint is damaged or missing; the message names the file."""


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


def digest_file(path: Path) -> FileDigest:
    """Read a file and return its size and SHA-256."""
    return FileDigest(path.stat().st_size, file_sha256(path))


def _canonical_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(
    directory: Path, digests: Mapping[str, FileDigest], details: Mapping[str, Any]
) -> None:
    """Write `manifest.json` for `digests`, keyed by path relative to `directory`.

    Files of the directory that are not among `digests` are read and hashed here.
    """
    files = {name: asdict(digest) for name, digest in digests.items()}
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            files[name] = asdict(digest_file(path))
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        **details,
        "files": dict(sorted(files.items())),
    }
    manifest["sha256"] = _canonical_digest(manifest)
    write_durably(directory / MANIFEST_NAME, json.dumps(manifest, indent=1))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a manifest and check it against its own digest.

    Raises:
        CheckpointError: it is missing, not JSON, of another format, or altered.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no manifest, so this is not a complete checkpoint"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not readable as JSON, the checkpoint is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _canonical_digest(manifest):
        raise CheckpointError(f"{path}: its content does not match its own digest")
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')}, this version reads {FORMAT_VERSION}"
        )
    return manifest


def verify_files(directory: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare size and SHA-256 of the named files with the manifest.

    A few files are hashed at once: one core hashes slower than a good disk reads.

    Raises:
        CheckpointError: names the first file that is missing or of another size, else the first
            that differs.
    """
    expected = {directory / name: manifest["files"][name] for name in names}
    for path, entry in expected.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
    pool = ThreadPoolExecutor(min(_HASHED_AT_ONCE, os.cpu_count() or 1))
    try:
        for (path, entry), digest in zip(
            expected.items(), pool.map(digest_file, expected), strict=True
        ):
            if digest.sha256 != entry["sha256"]:
                raise CheckpointError(f"{path}: its SHA-256 differs from the manifest's")
    finally:
        pool.shutdown(cancel_futures=True)


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Re-hash a whole checkpoint and return its manifest.

    Raises:
        CheckpointError: names the first file that is missing, altered or not in the manifest.
    """
    manifest = read_manifest(directory)
    check_name(directory, manifest)
    check_unlisted(directory, manifest)
    verify_files(directory, manifest, manifest["files"])
    return manifest


def check_name(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if the directory is named after another step than it holds."""
    match = _STEP_PATTERN.fullmatch(directory.name)
    step = manifest.get("step")
    if match and step is not None and int(match.group(1)) != step:
        raise CheckpointError(f"{directory / MANIFEST_NAME}: this is the checkpoint of step {step}")


def check_unlisted(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if the directory holds a file that the manifest does not list."""
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if name not in manifest["files"] and name != MANIFEST_NAME:
            raise CheckpointError(f"{path}: not listed in the manifest")


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, newest first, by name alone (nothing is verified)."""
    if not run_dir.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in run_dir.iterdir()
        if (match := _STEP_PATTERN.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint: `step-00001200`."""
    return f"step-{step:08d}"


def remove(directory: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves no half that looks whole.

    Raises:
        OSError: it is still there, whole.
    """
    doomed = directory.with_name(f"{directory.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    rename_durably(directory, doomed)
    delete_leftovers(doomed)


def delete_leftovers(path: Path) -> None:
    """Delete what is no checkpoint any more, or never was; say so where that fails.

    That is no reason to end a run: over NFS a file that somebody reads, as an evaluation does,
    keeps its directory from being deleted until it is closed.
    """
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(
            f"megaphi: {path} is not needed, but could not be deleted ({error}); the next save "
            "tries again",
            file=sys.stderr,
            flush=True,
        )


def _files(directory: Path) -> list[Path]:
    """All files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
