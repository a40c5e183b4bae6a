"""What must hold of a model directory that may come from anybody, before its files are opened."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaphi.formats.files import read_json_object
from megaphi.formats.manifest import MANIFEST_NAME, CheckpointError, verify_checkpoint

_CODE_SUFFIXES = (
    *(".py", ".so", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"),
    *(".metadata", ".distcp"),
)


def refuse_strange_entries(directory: Path) -> None:
    """Refuse a model directory with links out of it, pipes or devices, at any depth.

    A link would make us read, and copy into what we write, a file of whoever runs us; a pipe would
    make us wait for ever. The Hugging Face cache's own links, from `snapshots/REVISION/` to
    `blobs/`, are fine.

    Raises:
        ValueError: names the entry.
    """
    inside = directory.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    for path in _walk(directory):
        if path.is_symlink():
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):  # RuntimeError: a loop of links
                raise ValueError(f"{path}: a link that leads nowhere") from None
            if not any(target.is_relative_to(folder) for folder in allowed):
                raise ValueError(
                    f"{path}: a link to a place outside of the model's directory, which is not "
                    "followed; copy the file here if it belongs to the model"
                )
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path}: neither a file nor a directory; a model has no such thing")


def _walk(directory: Path) -> Iterator[Path]:
    """Everything below a directory; links are not followed."""
    waiting = [directory]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            yield path
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)


def verify_foreign_checkpoint(directory: Path) -> None:
    """Verify a checkpoint that may come from anybody.

    `verify_checkpoint` opens what the manifest names, so names must stay inside first.

    Raises:
        CheckpointError: it is damaged, or is none.
    """
    path = directory / MANIFEST_NAME
    try:
        refuse_strange_entries(directory)
        if path.exists():
            files = read_json_object(path).get("files")
            if not isinstance(files, dict):
                raise ValueError(f"{path}: lists no files")
            for name, entry in files.items():
                _check_entry(path, name, entry)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    verify_checkpoint(directory)


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Raise a `ValueError` unless a manifest's entry is a file of ours inside the checkpoint."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"{path}: {name[:80]!r} is not the name of a file in the checkpoint")
    if name.endswith(_CODE_SUFFIXES):
        raise ValueError(
            f"{path.parent / name}: pickles and programs can run code; a checkpoint has none"
        )
    sound = isinstance(entry, dict) and type(entry.get("bytes")) is int
    if not sound or not isinstance(entry.get("sha256"), str):
        raise ValueError(f"{path}: the entry of {name[:80]!r} has no size and SHA-256")
