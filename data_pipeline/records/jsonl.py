"""JSON lines as bytes: read in bounded memory, written with a running hash, Zstandard or plain.

Lines end in a line feed and in nothing else. U+2028, U+0085 and the like may stand inside a JSON
string, so files are split as bytes and never with `str.splitlines`, which would cut such a document
in two.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megaphi.durable import HashedFile

MAX_LINE_BYTES = 64 * 2**20  # longer lines are refused without being held in memory
READ_BYTES = 2**20
ZSTD_SUFFIX = ".zst"
ZSTD_LEVEL = 3
ZSTD_FEED_BYTES = 4096  # a hostile frame can grow 32,768-fold: this bounds one step to 128 MiB


def _zstandard() -> Any:
    """The optional `zstandard` package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "reading or writing .zst files needs zstandard: pip install zstandard"
        ) from None
    return zstandard


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of a .zst file of one or more frames.

    Unlike zstandard's own stream reader, a file that stops inside a frame is an error and not an
    early end.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._zstd = _zstandard()
        self._frame: Any = None
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: object) -> int:
        """Fill a buffer with the next bytes; returns their number, 0 at the end."""
        while not self._ready:
            chunk = self._input or self._stream.read(ZSTD_FEED_BYTES)
            self._input = b""
            if not chunk:
                if self._frame is not None:
                    raise OSError(f"{self._name}: the compressed file ends too early")
                return 0
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._zstd.ZstdError as error:
                raise OSError(f"{self._name}: not Zstandard data ({error})") from None
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the compressed stream, too."""
        self._stream.close()
        super().close()


def open_jsonl(path: Path) -> BinaryIO:
    """Open a .jsonl or .jsonl.zst file for reading bytes, decompressed.

    Raises:
        OSError: at opening, or while reading a damaged or truncated compressed file.
        ValueError: the file is compressed and `zstandard` is not installed.
    """
    stream = path.open("rb", buffering=READ_BYTES)
    if path.suffix != ZSTD_SUFFIX:
        return stream
    return buffered(cast(BinaryIO, ZstdReader(stream, str(path))))


def buffered(stream: BinaryIO) -> BinaryIO:
    """A raw stream with a buffer, so that lines can be read of it."""
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), READ_BYTES))


def read_lines(
    stream: BinaryIO, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (byte offset, line without its line feed) of a JSONL byte stream, in bounded memory.

    A line longer than `MAX_LINE_BYTES` is yielded as None and skipped up to its line feed. Blank
    lines are not yielded; a last line without line feed is. A carriage return before the line feed
    stays, which JSON takes for white space.

    Args:
        stream: the bytes; it must be able to seek if `start` is not 0.
        start: yield the lines that begin at this byte or later.
        stop: and before this one; None reads to the end.
    """
    offset = start
    if start:
        # From the byte before: if that is a line feed, a line begins exactly at `start`.
        stream.seek(start - 1)
        offset += _skip_line(stream) - 1
    while (stop is None or offset < stop) and (line := stream.readline(MAX_LINE_BYTES)):
        begin = offset
        offset += len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            offset += _skip_line(stream)
            yield begin, None
        elif line.strip():
            yield begin, line.removesuffix(b"\n")


def _skip_line(stream: BinaryIO) -> int:
    """Read past the next line feed, or to the end; returns the number of bytes."""
    skipped = 0
    while rest := stream.readline(READ_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


class LineWriter:
    """A file of lines that is written once, counting lines, bytes and SHA-256 on the way.

    Used as a context manager; after it the bytes are on the disk (fsync). Compressed if the name
    ends in `.zst`.

    Attributes:
        path: the file.
        lines: lines written.
        text_bytes: bytes written, before compression.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.text_bytes = 0
        self._file = HashedFile(path)
        self._compressor = None
        if path.suffix == ZSTD_SUFFIX:
            self._compressor = _zstandard().ZstdCompressor(level=ZSTD_LEVEL).compressobj()

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal; complete once closed."""
        return self._file.sha256

    def write(self, line: bytes) -> None:
        """Append one line, which ends in a line feed."""
        self.lines += 1
        self.text_bytes += len(line)
        self._file.write(line if self._compressor is None else self._compressor.compress(line))

    def close(self) -> None:
        """Write what is pending, flush to the disk and close."""
        if self._compressor is not None:
            self._file.write(self._compressor.flush())
        self._file.close()

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
