"""Where raw documents come from: source trees, JSONL, Parquet, and Hugging Face data sets.

`find_source` turns a name on the command line into a `Source`, and the readers yield raw rows or
bytes with their position. What makes a document acceptable is decided in `ingest.py`.
"""

import fnmatch
import importlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.jsonl import MAX_LINE_BYTES, file_sha256, open_jsonl, read_lines
from data_pipeline.records import Json, Reject, digest, record_id
from megaphi.errors import RunError

Kind = Literal["python", "jsonl", "parquet", "hub"]

SUFFIXES: dict[str, Kind] = {
    ".py": "python",
    ".jsonl": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
TEXT_FIELDS = ("content", "text", "code")
PARQUET_ROWS = 256  # rows held at a time; The Stack has documents of 1 MB


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source, or one data set of the hub.

    Attributes:
        kind: how it is read.
        path: the file; the name for `hub`.
        name: what identifies it within the run, `<source>/<path inside>`, for ids and messages.
        inside: path inside the source directory, for the record's `path`; empty for a data file.
        size: bytes, 0 where unknown.
        mtime_ns: modification time.
        refused: why it is not read, empty if it is.
    """

    kind: Kind
    path: str
    name: str
    inside: str = ""
    size: int = 0
    mtime_ns: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Source:
    """What one SOURCE argument stands for."""

    argument: str
    files: list[SourceFile]


def printable(path: str) -> str:
    """A file name as text: bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _kind_of(name: str) -> Kind | None:
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def find_source(argument: str, name: str, exclude: Sequence[str] = ()) -> Source:
    """Find what a SOURCE argument stands for.

    Args:
        argument: a .py, .jsonl, .jsonl.zst or .parquet file, a directory, a directory made by
            `datasets`, or the name of a data set on the Hugging Face hub.
        name: what its files are called in ids; unique within the run.
        exclude: patterns of names (as in a shell) of files and folders of a directory to leave out.

    Raises:
        FileNotFoundError: no such path, and not the form `owner/name[:split]`.
        ValueError: a kind of file that is not read, or a directory without such files.
    """
    if not os.path.lexists(argument):
        if argument.partition(":")[0].count("/") == 1 and not argument.startswith(("/", ".", "~")):
            return Source(argument, [SourceFile(kind="hub", path=argument, name=argument)])
        raise FileNotFoundError(
            f"{argument}: no such file or directory (a data set of the hub is OWNER/NAME[:SPLIT])"
        )
    if os.path.isdir(argument):
        saved = ("dataset_dict.json", "state.json")
        if any(os.path.exists(os.path.join(argument, file)) for file in saved):
            return Source(argument, [SourceFile(kind="hub", path=argument, name=name)])
        return Source(argument, _find_files(argument, name, exclude))
    kind = _kind_of(argument)
    if kind is None:
        raise ValueError(f"{argument}: not one of the kinds that are read: {', '.join(SUFFIXES)}")
    if not os.path.isfile(argument):
        raise ValueError(f"{argument}: is not a regular file")
    status = os.stat(argument)
    return Source(
        argument,
        [
            SourceFile(
                kind=kind,
                path=argument,
                name=name,
                inside=printable(os.path.basename(argument)) if kind == "python" else "",
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )
        ],
    )


def _find_files(root: str, name: str, exclude: Sequence[str]) -> list[SourceFile]:
    """The files of a directory: its Python files, or if there are none its data files."""
    found: list[SourceFile] = []
    _walk(root, name, exclude, found)
    if any(file.kind == "python" and not file.refused for file in found):
        return [file for file in found if file.kind == "python"]
    if found:
        return found
    raise ValueError(f"{root}: holds none of the files that are read: {', '.join(SUFFIXES)}")


def _walk(root: str, name: str, exclude: Sequence[str], found: list[SourceFile]) -> None:
    """Add the files below a directory, following no link.

    The order is fixed: the files of a directory, then its directories, each by the bytes of their
    names.
    """
    pending = [""]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(os.path.join(root, current)) as listing:
                entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            found.append(_entry_file(root, current, name, "python", str(error.strerror)))
            continue
        directories = []
        for entry in entries:
            if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in exclude):
                continue
            path = os.path.join(current, entry.name)
            kind = _kind_of(entry.name)
            if entry.is_dir(follow_symlinks=False):
                directories.append(path)
            elif entry.is_symlink() and os.path.isdir(entry.path):  # False for a loop
                found.append(_entry_file(root, path, name, "python", "symbolic link to a folder"))
            elif kind is not None:
                refused = "" if entry.is_file(follow_symlinks=False) else _what(entry)
                found.append(_entry_file(root, path, name, kind, refused))
        pending.extend(reversed(directories))


def _what(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink():
        return "symbolic link"
    mode = entry.stat(follow_symlinks=False).st_mode
    return "named pipe" if stat.S_ISFIFO(mode) else "device or socket"


def _entry_file(root: str, inside: str, name: str, kind: Kind, refused: str) -> SourceFile:
    path = os.path.join(root, inside)
    status = os.lstat(path)
    return SourceFile(
        kind=kind,
        path=path,
        name=f"{name}/{printable(inside)}",
        inside=printable(inside),
        size=0 if refused else status.st_size,
        mtime_ns=status.st_mtime_ns,
        refused=refused,
    )


def reject_at(source: str, position: str, reason: str, detail: str) -> Reject:
    """A reject of something that never became a record; its id is made from the position."""
    return Reject(record_id(source, position), reason, detail, position)


def read_bytes(file: SourceFile, limit: int) -> bytes:
    """Read a whole file, never following a link nor waiting for a pipe.

    Raises:
        OSError: it cannot be read, or is not a regular file any more.
        OverflowError: it is longer than `limit` bytes.
    """
    handle = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("not a regular file")
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise OverflowError(f"more than {limit} bytes")
    return data


def read_rows(file: SourceFile, source: str) -> Iterator[tuple[str, dict[str, Json] | Reject]]:
    """Yield (position, row or reject) of a JSONL file, Parquet file or hub data set.

    A file that ends early or cannot be read gives one reject `unreadable` for the rest of it.

    Args:
        file: the file.
        source: label, for the ids of rejects.
    """
    readers = {"jsonl": _jsonl_rows, "parquet": _parquet_rows, "hub": _hub_rows}
    rows = readers[file.kind](file)
    while True:
        try:
            position, row = next(rows)
        except StopIteration:
            return
        except OSError as error:
            if file.kind == "hub":  # half a data set for want of a network must not pass for all
                raise RunError(f"{file.path}: stopped while it was being read: {error}") from None
            yield file.name, reject_at(source, file.name, "unreadable", str(error))
            return
        if isinstance(row, tuple):
            yield position, reject_at(source, position, *row)
        else:
            yield position, row


Row = tuple[str, dict[str, Json] | tuple[str, str]]


def _jsonl_rows(file: SourceFile) -> Iterator[Row]:
    with open_jsonl(Path(file.path)) as stream:
        for offset, line in read_lines(stream):
            position = f"{file.name}:byte {offset}"
            if line is None:
                yield position, ("too_large", f"line longer than {MAX_LINE_BYTES} bytes")
                continue
            try:
                # Decoded here, since json.loads would also accept UTF-16. NaN is not JSON, but
                # what pandas writes for a missing value.
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
                row = json.loads(text, parse_constant=lambda name: None)
            except UnicodeDecodeError as error:
                yield position, ("utf8", f"byte {offset + error.start}: {error.reason}")
            except RecursionError:
                yield position, ("json", "nested too deeply")
            except ValueError as error:
                yield position, ("json", f"from byte {offset}: {error}")
            else:
                if isinstance(row, dict):
                    yield position, row
                else:
                    yield position, ("type", f"the line is not an object: {type(row).__name__}")


def _parquet_rows(file: SourceFile) -> Iterator[Row]:
    parquet = _import("pyarrow.parquet", "pyarrow", "Parquet files")
    import pyarrow

    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for index in range(batch.num_rows):
                    position = f"{file.name}:row {number}"
                    number += 1
                    try:
                        yield position, batch.slice(index, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        yield position, ("utf8", str(error))
    except pyarrow.ArrowException as error:
        raise OSError(f"not a readable Parquet file: {error}") from None


def _hub_rows(file: SourceFile) -> Iterator[Row]:
    for number, row in enumerate(_load_dataset(file)):
        yield f"{file.name}:row {number}", row


def _load_dataset(file: SourceFile) -> Any:
    """Open a data set of the hub for streaming, or one saved by `datasets`.

    Raises:
        ValueError: it cannot be had: offline, unknown, no such split.
    """
    datasets = _import("datasets", "datasets", "data sets of the Hugging Face hub")
    name, _, split = file.path.partition(":")
    try:
        if os.path.isdir(file.path):
            opened = datasets.load_from_disk(file.path)
            return opened["train"] if isinstance(opened, dict) else opened
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the hub client raises kinds of many libraries
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file.path}: no such path here, and the hub data set could not be opened "
            f"({type(error).__name__}: {reason}); check the name, the split and the network"
        ) from None


def _import(module: str, distribution: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"reading {what} needs {distribution}: pip install {distribution}"
        ) from None


def content_sha256(file: SourceFile) -> str:
    """SHA-256 of a data file, or over the Arrow files of a saved data set; "" for a hub name.

    Raises:
        OSError: it cannot be read.
    """
    if file.kind != "hub":
        return file_sha256(Path(file.path))
    arrow = sorted(Path(file.path).rglob("*.arrow"))
    return digest([[item.name, file_sha256(item)] for item in arrow]) if arrow else ""


def find_text_field(file: SourceFile, wanted: str | None) -> str | None:
    """The name of the text field of a data file, decided by its first row that is an object.

    Args:
        file: the data file.
        wanted: the field asked for; None to take the first of `content`, `text`, `code`.

    Returns:
        The field; None when no row is an object.

    Raises:
        ValueError: the first row has no such field; the fields that it has are named.
    """
    for position, row in read_rows(file, ""):
        if isinstance(row, Reject):
            continue
        candidates = TEXT_FIELDS if wanted is None else (wanted,)
        for field in candidates:
            if field in row:
                return field
        asked = f"no field {wanted!r}" if wanted else f"none of the fields {', '.join(TEXT_FIELDS)}"
        raise ValueError(
            f"{position}: {asked}; the row has {', '.join(map(repr, row)) or 'no fields'}; "
            "name the field with --text-field"
        )
    return None
