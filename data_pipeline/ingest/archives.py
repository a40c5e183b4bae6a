"""Members of archives as streams: zip, tar (plain, gz, bz2, xz, zst) and 7z.

Nothing is ever extracted: members are read from the archive one after the other, only regular files
are, and their names serve as text alone. What an archive can do to a reader is bounded:

    not_regular_file  symbolic and hard links, devices, named pipes, sparse files
    unsafe_path       absolute names, names with `..` or NUL
    duplicate_member  a name that came before (in a 7z archive, every member of such a name)
    encrypted         a member, or a whole archive, that needs a password
    compression       a method whose output cannot be bounded or read here
    nested_archive    an archive in an archive
    unreadable        a member whose size or checksum is wrong; a damaged or incomplete archive
    archive_bomb      the archive grew beyond `MAX_RATIO` times its size, or beyond another limit;
                      the rest of it is not read

The checksum of a compressed tar comes at its end: damage in the middle of one may show only there,
as an `unreadable` reject of the archive, after members before it were kept.

Directories are passed over, and members of kinds that ingest does not read (a README) as well.
"""

import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, cast

from data_pipeline.ingest.archive_members import (
    ArchiveBomb,
    Budget,
    Member,
    is_wanted,
    refuse,
)
from data_pipeline.ingest.compressed import decompressed
from data_pipeline.records.jsonl import READ_BYTES

MAX_MEMBERS = 5_000_000
MAX_DIRECTORY_BYTES = 256 * 2**20  # of a zip's central directory, which is held in memory
MAX_HEADER_BYTES = 4 * 2**20  # of one member of a tar: long names and pax records

# What hostile archives raise from within the standard library, besides OSError.
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(ValueError, OverflowError, RecursionError, NotImplementedError, RuntimeError),
)


class _Counted(io.RawIOBase):
    """A stream that takes from a budget what is read of it.

    Args:
        stream: the stream.
        budget: what is taken from.
        size: bytes that the archive says the stream has; at its end any other number is an error.

    Attributes:
        allowance: bytes that may still be read before it is set anew; None for any number.
    """

    def __init__(self, stream: BinaryIO, budget: Budget, size: int | None = None) -> None:
        self._stream = stream
        self._budget = budget
        self._left = size
        self.allowance: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self._stream.read(len(target))
        self._budget.take(len(data))
        if self._left is not None:
            self._left -= len(data)
            if self._left and not data:
                raise OSError(f"ends {self._left} bytes before the size that is declared")
        if self.allowance is not None:
            self.allowance -= len(data)
            if self.allowance < 0:
                raise ArchiveBomb(f"a member's header is longer than {MAX_HEADER_BYTES} bytes")
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Borrowed(io.RawIOBase):
    """A member's stream for others, who may close it, or let a buffer around it be collected."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self._stream.read(len(target))
        target[: len(data)] = data
        return len(data)


def read_members(path: str, size: int) -> Iterator[Member]:
    """Yield the members of an archive that are read or refused, in their order in it.

    Args:
        path: the archive; its kind is told by the end of its name.
        size: its bytes, which bound what is read from it.

    Raises:
        ArchiveBomb: from here or from a member's stream: stop reading.
        OSError: the archive is damaged or ends early; nothing more can be read.
    """
    budget = Budget(size)
    ending = path.lower()
    if ending.endswith(".7z"):
        from data_pipeline.ingest.sevenzip import sevenzip_members

        members = sevenzip_members(path, budget)
    else:
        members = (
            _zip_members(path, budget) if ending.endswith(".zip") else _tar_members(path, budget)
        )
    count = 0
    try:
        for member in members:
            count += 1
            if count > MAX_MEMBERS:
                raise ArchiveBomb(f"more than {MAX_MEMBERS} members")
            if member.stream is not None:
                member = replace(member, stream=cast(BinaryIO, _Borrowed(member.stream)))
            yield member
    except DAMAGE as error:
        raise OSError(f"not a readable archive: {type(error).__name__}: {error}") from None


def _zip_members(path: str, budget: Budget) -> Iterator[Member]:
    with open(path, "rb") as stream:
        # The field of the end record; reading the directory itself would be too late to refuse.
        end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
        if end and end[5] > MAX_DIRECTORY_BYTES:
            raise ArchiveBomb(f"a directory of {end[5]} bytes")
        seen: set[str] = set()
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            for info in infos:
                member = _zip_refusal(info, seen)
                if member is None and is_wanted(info.filename):
                    try:
                        with archive.open(info) as opened:
                            counted = _Counted(cast(BinaryIO, opened), budget, info.file_size)
                            member = Member(info.filename, cast(BinaryIO, counted))
                            yield member
                    except DAMAGE as error:
                        member = Member(info.filename, reason="unreadable", detail=str(error))
                        yield member
                elif member is not None:
                    yield member
            if end and end[4] != len(infos):
                raise OSError(f"{len(infos)} members, but its end says {end[4]}")


def _zip_refusal(info: zipfile.ZipInfo, seen: set[str]) -> Member | None:
    name, mode = info.filename, info.external_attr >> 16
    if info.is_dir():
        return None
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        return Member(name, reason="not_regular_file", detail=f"mode {mode:o}")
    refusal = refuse(name, seen)
    if refusal is not None or not is_wanted(name):
        return refusal
    if info.flag_bits & 0x1:
        return Member(name, reason="encrypted", detail="needs a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        detail = f"method {info.compress_type}: stored and deflated members are read"
        return Member(name, reason="compression", detail=detail)
    return None


class _TarInfo(tarfile.TarInfo):
    """Makes a damaged header an error; `tarfile` takes one in the middle for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_TarInfo":
        try:
            return super().fromtarfile(tar)
        except (
            tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
            tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
            tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
        ) as error:
            raise OSError(f"damaged or cut short at byte {tar.offset}: {error}") from None


def _tar_members(path: str, budget: Budget) -> Iterator[Member]:
    seen: set[str] = set()
    with decompressed(open(path, "rb"), path) as opened:
        counted = _Counted(opened, budget)
        counted.allowance = MAX_HEADER_BYTES
        # "r|" reads forward only; a name that is not UTF-8 becomes backslash escapes.
        with tarfile.open(
            mode="r|",
            fileobj=cast(BinaryIO, counted),
            tarinfo=_TarInfo,
            encoding="utf-8",
            errors="backslashreplace",
        ) as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # kept for random access
                counted.allowance = None
                stream = archive.extractfile(info) if info.isreg() else None
                if info.isdir():
                    pass
                elif not info.isreg() or info.issparse():
                    yield Member(info.name, reason="not_regular_file", detail=_tar_type(info))
                elif (refusal := refuse(info.name, seen)) is not None:
                    yield refusal
                elif is_wanted(info.name):
                    yield Member(info.name, cast(BinaryIO, stream))
                if stream is not None and not info.issparse():
                    while stream.read(READ_BYTES):  # counted while the budget is the member's
                        pass
                counted.allowance = MAX_HEADER_BYTES
        counted.allowance = None
        while counted.read(READ_BYTES):  # to the checksum of the compression
            pass


def _tar_type(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"link to {info.linkname[:200]!r}"
    return "sparse file" if info.issparse() else f"type {info.type!r}"
