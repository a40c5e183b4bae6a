"""Files that appear complete or not at all, and that are on the disk once a call returns.

The one place for locks between processes, hashes of files, and publication by rename: checkpoints,
exports, token files, records and ledgers all build on it. It imports neither torch nor numpy.
"""

import fcntl
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaphi.errors import RunError

_BLOCK_BYTES = 1 << 20  # gather this much before hashing and writing


def sync(path: Path) -> None:
    """Fsync a file, or a directory so that the renames in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents so that they survive a power failure."""
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
    rename_durably(temporary, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or directory whose bytes are on the disk; an older file is replaced."""
    source.replace(target)
    sync(target.parent)


def publish_directory(temporary: Path, final: Path) -> None:
    """Sync every file and directory below `temporary`, then rename it to `final`.

    Raises:
        FileExistsError: something already has the final name.
    """
    if final.exists():
        raise FileExistsError(f"{final}: already exists")
    for path in sorted(temporary.rglob("*"), reverse=True):  # what a directory holds comes first
        sync(path)
    sync(temporary)
    rename_durably(temporary, final)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_locked(path: Path, *, shared: bool = False) -> io.FileIO:
    """Open a file for reading and appending, and lock it against other processes.

    Args:
        path: created when missing.
        shared: other processes may hold it too if they also ask for a shared lock.

    Returns:
        The open file, unbuffered; closing it, or the end of the process, releases the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    file = io.FileIO(descriptor, "ab+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


class HashedFile:
    """A file written once from its beginning to its end, and hashed on the way.

    The SHA-256 is that of what was written, not of what a disk gave back.

    Args:
        path: created, or emptied.

    Attributes:
        size: bytes written so far.

    Raises:
        OSError: the disk is full or fails; from `write` and `close`.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file = path.open("wb", buffering=0)
        self._pending = bytearray()
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of everything written; complete after `close`."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.size += len(data)
        if len(data) >= _BLOCK_BYTES:
            self._flush()
            self._put(memoryview(data))
            return
        self._pending += data
        if len(self._pending) >= _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        block, self._pending = self._pending, bytearray()
        self._put(memoryview(block))

    def _put(self, data: memoryview) -> None:
        self._hash.update(data)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Write what is pending, fsync and close."""
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without writing what is pending, after an error."""
        self._file.close()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class NewFile:
    """A hashed file written as `<final>.tmp-<pid>-<random>`.

    `close` makes the bytes durable, `publish` renames, `discard` removes the temporary file.

    Args:
        final: name after `publish`; missing folders are created.
        error_type: raised when a write fails, with the file's name and the system's reason.
    """

    def __init__(self, final: Path, error_type: type[RunError] = RunError) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        self.final = final
        self.temporary = Path(f"{final}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._file = HashedFile(self.temporary)
        self._error_type = error_type

    @property
    def sha256(self) -> str:
        """Hex digest of everything written; complete after `close`."""
        return self._file.sha256

    def write(self, data: bytes) -> None:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunError:
        return self._error_type(
            f"{self.temporary}: cannot write: {error.strerror}; {self.final.name} was not created"
        )

    def close(self) -> None:
        """Write out, fsync and close."""
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error

    def publish(self) -> None:
        """Rename to the final name; the caller then fsyncs the folder."""
        self.temporary.replace(self.final)

    def discard(self) -> None:
        """Close and remove the temporary file, if it is still there."""
        self._file.abandon()
        self.temporary.unlink(missing_ok=True)


@contextmanager
def partial_file(final: Path) -> Iterator[Path]:
    """Context of a file that appears under its final name only when the block succeeds.

    The block writes `FINAL.partial`; the next call overwrites what a killed process left there.

    Raises:
        ValueError: the final name is taken.
        RunError: another process is writing it.
    """
    if final.exists() or final.is_symlink():
        raise ValueError(f"{final}: already exists; name a new file")
    if final.parent.exists() and not final.parent.is_dir():
        raise ValueError(f"{final.parent}: is no directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{final.name}.partial")
    with _locked(temporary, final):
        try:
            yield temporary
            sync(temporary)
            rename_durably(temporary, final)
        except Exception:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def partial_directory(final: Path) -> Iterator[Path]:
    """Context of a directory that appears under its final name only when the block succeeds.

    The block fills an empty directory inside `FINAL.partial`, which the next call empties again
    after a kill.

    Raises:
        ValueError: the final name, or that of the work directory, is taken.
        RunError: another process is writing it.
    """
    require_free(final)
    work = final.with_name(f"{final.name}.partial")
    found = {work.name} if work.exists() and not work.is_dir() else set()
    if work.is_dir():
        found = {path.name for path in work.iterdir()} - {"lock", "content"}
    if found:
        raise ValueError(f"{work}: is needed for work in progress, but holds {min(found)}; move it")
    work.mkdir(parents=True, exist_ok=True)
    content = work / "content"
    with _locked(work / "lock", final):
        if content.exists():
            shutil.rmtree(content)
        content.mkdir()
        try:
            yield content
            if final.exists():
                final.rmdir()
            publish_directory(content, final)
        finally:
            shutil.rmtree(work)


def require_free(final: Path) -> None:
    """Raise a `ValueError` if a name is taken by anything but an empty directory."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise ValueError(f"{final}: already exists; name a new or an empty directory")


@contextmanager
def _locked(path: Path, final: Path) -> Iterator[None]:
    """Context that holds the lock of a work in progress."""
    try:
        lock = open_locked(path)
    except BlockingIOError:
        raise RunError(f"{path}: another process is writing {final.name}") from None
    with lock:
        yield
