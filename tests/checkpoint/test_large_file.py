"""Large files against what was written into them, whatever the sizes, the disk and its speed."""

import errno
import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest

from megaphi.formats import large_file
from megaphi.formats.large_file import LargeFile

BLOCK = 1 << 14


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_file, "BLOCK_BYTES", BLOCK)


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path):
    """A path on the disk, and one on a file system that may know no direct IO."""
    if request.param == "disk":
        yield tmp_path / "file"
        return
    path = Path(f"/dev/shm/megaphi-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "size", [0, 1, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 9 * BLOCK + 5]
)
def test_content_and_hash(place: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    place.write_bytes(b"x" * (size + 10_000))  # of an earlier attempt
    pieces = random.Random(1)
    with LargeFile(place) as file:
        start = 0
        while start < size:
            end = start + pieces.choice([1, 100, 5000, 3 * BLOCK])
            piece = bytearray(content[start:end])
            file.write(memoryview(piece))
            piece[:] = bytes(len(piece))  # what was written is the file's
            start += len(piece)
    assert place.read_bytes() == content
    assert file.digest.bytes == size
    assert file.digest.sha256 == hashlib.sha256(content).hexdigest()


def test_a_disk_that_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, content = os.write, random.Random(0).randbytes(7 * BLOCK + 99)

    def slow(descriptor: int, data: memoryview) -> int:
        time.sleep(0.001)
        return write(descriptor, data[: max(4096, len(data) // 8192 * 4096)])

    monkeypatch.setattr(os, "write", slow)
    with LargeFile(tmp_path / "file") as file:
        file.write(content)
    assert (tmp_path / "file").read_bytes() == content
    assert file.digest.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [1, 20 * BLOCK])
def test_a_full_disk_is_an_error_that_names_the_file(size: int) -> None:
    threads = threading.active_count()
    with pytest.raises(OSError, match="/dev/full") as caught, LargeFile(Path("/dev/full")) as file:
        file.write(bytes(size))
    assert caught.value.errno == errno.ENOSPC
    assert threading.active_count() == threads


def test_an_error_of_the_caller_ends_it(tmp_path: Path) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def fill() -> None:
        with LargeFile(tmp_path / "file") as file:
            file.write(bytes(5 * BLOCK))
            raise KeyError

    with pytest.raises(KeyError):
        fill()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
