"""Files that are on the disk when they are said to be."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Fsync a file, or a directory so that the renames in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, so that it is still there after the power fails."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace a file's content in one step: temporary name, sync, rename, sync of the directory.

    The temporary name is fixed, so that what a killed process left is overwritten by the next:
    the caller makes sure that only one process writes at a time.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
