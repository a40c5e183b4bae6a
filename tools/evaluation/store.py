"""The files of an evaluation, written so that a killed one continues where it was.

A row is one line of JSON, known by (task_id, sample). A row that is complete on the disk is never
made again; a last line that a kill has torn is cut off.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaphi.durable import open_locked, write_durably

SETTINGS_NAME = "settings.json"
Key = tuple[str, int]


class RowFile:
    """An append-only file of rows; a context manager.

    Attributes:
        rows: what it holds, by (task_id, sample).

    Raises:
        ValueError: a line before the last is no row.
    """

    def __init__(self, path: Path) -> None:
        self.rows: dict[Key, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                self.rows[row["task_id"], row["sample"]] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number} is not a row of an evaluation") from None
        if whole < len(content):
            os.truncate(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is with the operating system when this returns."""
        self.rows[row["task_id"], row["sample"]] = dict(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exception: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def open_directory(directory: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold an evaluation's directory: made, ours alone, and for these settings only.

    Raises:
        ValueError: another process works in it, or it was begun with other settings.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{error.filename}: is no directory; give another --out") from None
    try:
        lock = open_locked(directory / ".lock")
    except BlockingIOError:
        raise ValueError(f"{directory}: another evaluation is running in it") from None
    with lock:
        path = directory / SETTINGS_NAME
        if path.exists():
            _compare(path, settings)
        else:
            write_durably(path, json.dumps(settings, indent=1) + "\n")
        yield


def _compare(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the first setting that differs."""
    try:
        before = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path}: not readable; remove the directory to start anew") from None
    for key in {**settings, **before}:
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{path}: begun with {key} {before.get(key)!r}, now it is {settings.get(key)!r}; "
                "give another --out"
            )
