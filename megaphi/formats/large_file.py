"""Gigabytes written as fast as the disk takes them, hashed on the way.

Three things happen at once: the caller fills a block of memory, a thread hashes the block before
it, and another writes it with direct IO, which moves it from that memory to the disk. Through the
page cache the kernel copies every byte once more, page by page, which costs several times the CPU
of the write itself, and throws out what is going to be read next.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaphi.formats.manifest import FileDigest

# Offsets of blocks and their memory are aligned to pages, as direct IO needs it.
BLOCK_BYTES = 8 << 20
_NUM_BLOCKS = 3
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


@dataclass
class _Block:
    """Memory that is filled, then hashed and written, then filled again."""

    memory: memoryview = field(
        default_factory=lambda: memoryview(mmap.mmap(-1, BLOCK_BYTES))  # page-aligned
    )
    in_use: "list[Future[None]]" = field(default_factory=list)


class LargeFile:
    """A file that is written from its beginning to its end; a context manager.

    When the context ends without an exception every byte is on the disk and `digest` is known.

    Args:
        path: created, or emptied.
        hashed: False leaves the hash out.

    Raises:
        OSError: the disk is full or fails; from any call, about what was written before it.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self.size = 0
        """Bytes so far."""
        self._path = path
        self._descriptor = _open(path)
        self._hash = hashlib.sha256() if hashed else None
        # of one worker each: blocks stay in order
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._blocks = deque(_Block() for _ in range(_NUM_BLOCKS))
        self._filled = 0

    @property
    def digest(self) -> FileDigest:
        """Size and SHA-256, once the context has ended."""
        assert self._hash is not None, "this file is not hashed"
        return FileDigest(self.size, self._hash.hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are copied before this returns."""
        rest = memoryview(data).cast("B")
        self.size += len(rest)
        while rest:
            part = rest[: BLOCK_BYTES - self._filled]
            end = self._filled + len(part)
            # numpy lets go of Python's lock: `data` may be a mapped file that has yet to be read
            target = np.frombuffer(self._blocks[0].memory[self._filled : end], np.uint8)
            np.copyto(target, np.frombuffer(part, np.uint8))
            self._filled = end
            rest = rest[len(part) :]
            if end == BLOCK_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        """Give the block to the threads and wait until the next one is free."""
        block = self._blocks[0]
        data = block.memory[: self._filled]
        if self._hash is not None:
            block.in_use.append(self._hasher.submit(self._hash.update, data))
        block.in_use.append(self._writer.submit(self._write_all, data))
        self._filled = 0
        self._blocks.rotate(-1)
        _wait_for(self._blocks[0])

    def _write_all(self, data: memoryview) -> None:
        """Write a block."""
        while data:
            try:
                written = os.write(self._descriptor, data)
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise OSError(error.errno, error.strerror, str(self._path)) from None
                # the end of a file, which is no multiple of the disk's blocks
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
                continue
            data = data[written:]

    def __enter__(self) -> "LargeFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._hand_over()
                for block in self._blocks:
                    _wait_for(block)
                os.fsync(self._descriptor)
        finally:
            self._hasher.shutdown()
            self._writer.shutdown()
            os.close(self._descriptor)


def _open(path: Path) -> int:
    """Open for direct IO; without it on a file system that has none, such as tmpfs."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _wait_for(block: _Block) -> None:
    """Wait until nobody reads a block; raises what went wrong with it."""
    while block.in_use:
        block.in_use.pop().result()
