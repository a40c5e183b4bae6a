"""Compressed streams, told by their first bytes: gzip, bzip2, xz and Zstandard."""

import io
import lzma
from typing import BinaryIO, cast

from data_pipeline.records.jsonl import READ_BYTES, ZstdReader, buffered

XZ_MEMORY_BYTES = 512 * 2**20  # `xz -9` needs 64 MiB


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """The decompressed bytes of a stream, buffered; a stream that is not compressed as it is.

    Args:
        stream: the bytes, from their beginning; closed with the result.
        name: of the file, for messages.

    Raises:
        OSError, EOFError, lzma.LZMAError, zlib.error: from a read of the result: it is damaged or
            ends too early.
    """
    source = stream if isinstance(stream, io.BufferedReader) else buffered(stream)
    start = cast(io.BufferedReader, source).peek(6)[:6]
    if start.startswith(b"\x1f\x8b"):
        import gzip

        return buffered(cast(BinaryIO, gzip.GzipFile(fileobj=source)))
    if start.startswith(b"BZh"):
        import bz2

        return buffered(cast(BinaryIO, bz2.BZ2File(source)))
    if start == b"\xfd7zXZ\0":
        return buffered(cast(BinaryIO, _XzReader(source)))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return buffered(cast(BinaryIO, ZstdReader(source, name)))
    return source


class _XzReader(io.RawIOBase):
    """The decompressed bytes of an .xz file, with a limit of memory, which `lzma.open` has not."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder: lzma.LZMADecompressor | None = None
        self._started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while True:
            if self._decoder is None or self._decoder.eof:
                rest = self._decoder.unused_data if self._decoder else b""
                data = (rest or self._stream.read(READ_BYTES)).lstrip(
                    b"\0" if self._started else b""
                )
                if not data:
                    return 0
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)
                self._started = True
            else:
                data = self._stream.read(READ_BYTES) if self._decoder.needs_input else b""
                if self._decoder.needs_input and not data:
                    raise EOFError("the compressed file ends too early")
            block = self._decoder.decompress(data, len(target))
            if block:
                target[: len(block)] = block
                return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()
