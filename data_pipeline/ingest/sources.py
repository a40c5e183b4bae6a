"""Where raw documents come from: source trees, data files, archives, dumps, hub data sets.

`find_source` turns a name on the command line into a `Source`, a list of files of known kinds;
`readers.py` has the reader of each kind.
"""

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["python", "jsonl", "parquet", "archive", "posts", "hub"]

_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
ENDINGS: dict[str, Kind] = {
    **dict.fromkeys((".py", ".pyw"), "python"),
    **dict.fromkeys((f".jsonl{packed}" for packed in _COMPRESSED), "jsonl"),
    **dict.fromkeys((f".ndjson{packed}" for packed in _COMPRESSED), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".zip", ".7z", ".tgz", ".txz", ".tbz2"), "archive"),
    **dict.fromkeys((f".tar{packed}" for packed in _COMPRESSED), "archive"),
    ".xml": "posts",
}
"""The kind of a file by the end of its name, in lower case; `readers.READERS` reads each kind."""
POSTS_MEMBER = "Posts.xml"  # of a 7z archive of the Stack Exchange data dump


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
        reason: of the reject, where it is refused.
    """

    kind: Kind
    path: str
    name: str
    inside: str = ""
    size: int = 0
    mtime_ns: int = 0
    refused: str = ""
    reason: str = "not_regular_file"


@dataclass(frozen=True)
class Source:
    """What one SOURCE argument stands for."""

    argument: str
    files: list[SourceFile]


def printable(path: str) -> str:
    """A file name as text: bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def kind_of(name: str) -> Kind | None:
    """The kind of a file by the end of its name; None for one that is not read."""
    lowered = name.lower()
    return next((kind for ending, kind in ENDINGS.items() if lowered.endswith(ending)), None)


def find_source(argument: str, name: str, exclude: Sequence[str] = ()) -> Source:
    """Find what a SOURCE argument stands for.

    Args:
        argument: a file of one of the kinds of `ENDINGS`, a directory, a directory made by
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
    kind = kind_of(argument)
    if kind is None:
        raise ValueError(f"{argument}: not one of the kinds that are read: {', '.join(ENDINGS)}")
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
    """The files of a directory: its Python files, or if there are none its data files.

    Alongside Python files, data files are refused and not passed over: one script in a folder of
    Parquet files must not pass for the whole folder.
    """
    found: list[SourceFile] = []
    _walk(root, name, exclude, found)
    if any(file.kind == "python" and not file.refused for file in found):
        why = "beside .py files: name it as a source to read it, or leave it out with `exclude`"
        return [
            file
            if file.kind == "python" or file.refused
            else replace(file, refused=why, reason="data_file")
            for file in found
        ]
    if found:
        return found
    raise ValueError(f"{root}: holds none of the files that are read: {', '.join(ENDINGS)}")


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
            kind = kind_of(entry.name)
            if entry.is_dir(follow_symlinks=False):
                directories.append(path)
            elif entry.is_symlink() and os.path.isdir(entry.path):  # False for a loop
                found.append(_entry_file(root, path, name, "python", "symbolic link to a folder"))
            elif kind is not None and kind != "posts":  # other programs write .xml, too
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


def check_outside(sources: Sequence[Source], out: Path) -> None:
    """Check that no source would find the parts of an output when it is read again.

    Args:
        sources: what is read.
        out: the records directory to make.

    Raises:
        ValueError: one would.
    """
    place = out.resolve()
    for source in sources:
        root = Path(source.argument)
        reads_data = any(file.kind != "python" and not file.refused for file in source.files)
        if reads_data and root.is_dir() and root.resolve() in (place, *place.parents):
            raise ValueError(
                f"{out}: is in {printable(source.argument)}, whose data files are read: the next "
                "run would read these records again; choose an `out` elsewhere"
            )


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
