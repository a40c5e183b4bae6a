"""Members of 7z archives as streams, through py7zr, which hands decompressed blocks to a writer.

py7zr calls, the reader here is called: a thread runs the decompression and a bounded queue joins
the two, so that neither the disk nor the memory holds more than a few blocks, whatever the size of
the archive (the Posts.xml of Stack Overflow: 20 GB that grow to 100 GB).
"""

import io
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from data_pipeline.ingest.archive_members import (
    ArchiveBomb,
    Budget,
    Member,
    is_unsafe,
    is_wanted,
    refuse,
)
from data_pipeline.ingest.sources import POSTS_MEMBER

# Methods whose decoders stop at a given number of bytes. Deflate, Zstandard, Brotli and PPMd do
# not, as py7zr calls them: one block of theirs can take any amount of memory.
_METHODS = {"LZMA", "LZMA2", "BZip2", "COPY", "DELTA", "BCJ", "ARM", "ARMT", "PPC", "SPARC", "IA64"}
_QUEUED_BLOCKS = 4
_BLOCK_BYTES = 2**20  # of the queue; py7zr decompresses up to 128 MB at a time from very dense data


def _py7zr() -> Any:
    """The optional `py7zr` package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import py7zr
    except ImportError:
        raise ValueError("reading .7z files needs py7zr: pip install 'megaphi[data]'") from None
    return py7zr


class _Stopped(Exception):
    """The reader has gone; ends the decompressing thread."""


class _Pipe(io.RawIOBase):
    """The reading end: the members that the thread decompresses, one after the other."""

    def __init__(self, blocks: "queue.Queue[Any]") -> None:
        self._blocks = blocks
        self._ready = memoryview(b"")
        self._ended = True
        self._failed: BaseException | None = None

    def _get(self) -> Any:
        """What the thread sends next; an error is raised, and again at every later call."""
        item = self._failed or self._blocks.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        return item

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._ready and not self._ended:
            item = self._get()
            self._ended = item is None
            self._ready = memoryview(item or b"")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def next_member(self) -> str | None:
        """Skip to the next member; its name, or None after the last.

        Raises:
            ArchiveBomb, OSError: the decompression stopped.
        """
        self._ready = memoryview(b"")
        while True:
            item = self._get()
            if isinstance(item, str):
                self._ended = False
                return item or None


def _start(archive: Any, names: list[str], budget: Budget) -> tuple[_Pipe, Any]:
    """Start the thread; returns the pipe and a function that ends the thread."""
    from py7zr.io import NullIO, Py7zIO, WriterFactory

    blocks: queue.Queue[Any] = queue.Queue(_QUEUED_BLOCKS)
    stopped = threading.Event()
    wanted = set(names)

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                blocks.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        raise _Stopped

    class Writer(Py7zIO):
        def write(self, s: bytes | bytearray) -> int:
            budget.take(len(s))
            for start in range(0, len(s), _BLOCK_BYTES):
                put(bytes(s[start : start + _BLOCK_BYTES]))
            return len(s)

        def read(self, size: int | None = None) -> bytes:
            return b""

        def seek(self, offset: int, whence: int = 0) -> int:
            return offset

        def flush(self) -> None:
            pass

        def size(self) -> int:
            return 0

        def close(self) -> None:
            put(None)

    class Factory(WriterFactory):
        def create(self, filename: str) -> Any:
            if filename not in wanted:
                return NullIO()  # type: ignore[no-untyped-call]
            put(filename)
            return Writer()

    def decompress() -> None:
        try:
            archive.extract(targets=names, factory=Factory())
            put("")
        except _Stopped:
            return
        except Exception as error:  # py7zr raises kinds of its own and of its decoders
            known = isinstance(error, ArchiveBomb | OSError)
            failure = error if known else OSError(f"{type(error).__name__}: {error}")
            with suppress(_Stopped):
                put(failure)

    thread = threading.Thread(target=decompress, daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        thread.join()

    return _Pipe(blocks), stop


def _open(path: str, budget: Budget) -> Any:
    """Open an archive and check what its header says.

    Raises:
        ArchiveBomb: its members are too large together.
        OSError: it is damaged, encrypted, or compressed by a method that is not read.
    """
    py7zr = _py7zr()
    stream = open(path, "rb")  # noqa: SIM115 - closed by the callers through the archive
    try:
        # An open file, since py7zr decompresses folders of a path in parallel.
        archive = py7zr.SevenZipFile(stream, "r")
        if archive.password_protected:
            raise OSError("encrypted")
        info = archive.archiveinfo()
        odd = [name for name in info.method_names if name.rstrip("*") not in _METHODS]
        if odd:
            raise OSError(f"compression {', '.join(odd)}: LZMA, LZMA2 and BZip2 are read")
        if info.uncompressed > budget.limit:
            raise ArchiveBomb(f"holds {info.uncompressed} bytes, more than {budget.limit}")
        return archive
    except (ArchiveBomb, OSError):
        stream.close()
        raise
    except Exception as error:  # a hostile header raises anything
        stream.close()
        raise OSError(f"not a readable 7z archive: {type(error).__name__}: {error}") from None


def sevenzip_members(path: str, budget: Budget) -> Iterator[Member]:
    """Yield the members of a 7z archive that are read or refused: see `archives.read_members`.

    The refused ones come first.

    Raises:
        ArchiveBomb, OSError: see `_open`, and damage found while decompressing.
    """
    archive = _open(path, budget)
    normalised = [
        str(PurePosixPath(file.filename)) for file in archive.files if not file.is_directory
    ]
    counts = Counter(normalised)
    names: dict[str, str] = {}
    with archive:
        for file in archive.files:
            name = file.filename
            if file.is_directory:
                continue
            if file.is_symlink or file.is_junction or file.is_socket:
                yield Member(name, reason="not_regular_file", detail="link or socket")
            elif not is_unsafe(name) and counts[str(PurePosixPath(name))] > 1:
                yield Member(name, reason="duplicate_member", detail="several have this name")
            elif (refusal := refuse(name, set())) is not None:
                yield refusal
            elif is_wanted(name):
                names[str(PurePosixPath(name))] = name
        if names:
            pipe, stop = _start(archive, list(names.values()), budget)
            try:
                yield from _stream(pipe, names)
            finally:
                stop()


def _stream(pipe: _Pipe, names: dict[str, str]) -> Iterator[Member]:
    """Yield the members as they come, then complain of those that did not."""
    missing = dict(names)
    while (name := pipe.next_member()) is not None:
        missing.pop(name, None)
        yield Member(names[name], cast(BinaryIO, pipe))
    if missing:
        raise OSError(f"{len(missing)} members were not found in the archive")


def holds_posts(path: str) -> bool:
    """Whether an archive holds the Posts.xml of the Stack Exchange data dump.

    Raises:
        ValueError: py7zr is not installed.
    """
    try:
        with _open(path, Budget(2**50)) as archive:
            return any(PurePosixPath(f.filename).name == POSTS_MEMBER for f in archive.files)
    except (OSError, ArchiveBomb):
        return False  # read as an archive, which then says what is wrong with it


def open_posts(path: str, size: int) -> Iterator[BinaryIO]:
    """Yield one stream: Posts.xml of an archive.

    Raises:
        ArchiveBomb, OSError: see `_open`, and damage found while decompressing.
    """
    budget = Budget(size)
    with _open(path, budget) as archive:
        names = [
            f.filename for f in archive.files if PurePosixPath(f.filename).name == POSTS_MEMBER
        ]
        if len(names) != 1 or is_unsafe(names[0]):
            raise OSError(f"holds {len(names)} files named {POSTS_MEMBER}")
        pipe, stop = _start(archive, names, budget)
        try:
            for member in _stream(pipe, {str(PurePosixPath(names[0])): names[0]}):
                assert member.stream is not None
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, member.stream)))
        finally:
            stop()
