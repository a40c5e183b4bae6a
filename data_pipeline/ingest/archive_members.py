"""A member of an archive, and the limits within which archives are read."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from data_pipeline.ingest.sources import kind_of

MAX_RATIO = 200  # Python sources and JSON shrink 5 to 20 times


FREE_BYTES = 64 * 2**20  # that every archive may grow to, so that small ones are not judged


MAX_BYTES = 2**40  # decompressed, of one archive


MAX_NAME = 4096  # characters


class ArchiveBomb(Exception):
    """The archive is more than a reader should take; `str()` says what of it."""


@dataclass(frozen=True)
class Member:
    """A regular file of an archive, or the reason why a member is not read.

    Attributes:
        name: its name in the archive, as text.
        stream: its bytes, valid until the next member is asked for; None for a refused one.
        reason: reason of the reject, empty for a readable member.
        detail: of the reject.
    """

    name: str
    stream: BinaryIO | None = None
    reason: str = ""
    detail: str = ""


class Budget:
    """Counts what an archive decompresses to.

    Args:
        size: bytes of the archive.
    """

    def __init__(self, size: int) -> None:
        self.limit = min(MAX_BYTES, size * MAX_RATIO + FREE_BYTES)
        self._size = size
        self._used = 0

    def take(self, count: int) -> None:
        """Count bytes.

        Raises:
            ArchiveBomb: more than the limit.
        """
        self._used += count
        if self._used > self.limit:
            raise ArchiveBomb(
                f"more than {self.limit} bytes come out of {self._size}: at most {MAX_RATIO}-fold "
                f"and {MAX_BYTES} are read"
            )


def is_unsafe(name: str) -> bool:
    """Whether a member's name points out of the archive, or is no name at all."""
    return (
        not name
        or len(name) > MAX_NAME
        or name.startswith(("/", "\\"))
        or name[1:2] == ":"
        or "\0" in name
        or ".." in name.replace("\\", "/").split("/")
    )


def refuse(name: str, seen: set[str]) -> Member | None:
    """The refusal of a regular member by its name, None for one to be read.

    Args:
        name: as the archive has it.
        seen: names that came before; the member's is added.
    """
    if is_unsafe(name):
        return Member(name[:MAX_NAME], reason="unsafe_path", detail=repr(name[:200]))
    key = str(PurePosixPath(name))
    if key in seen:
        return Member(name, reason="duplicate_member", detail="the name came before")
    seen.add(key)
    if kind_of(name) == "archive":
        return Member(name, reason="nested_archive", detail="archives in archives are not read")
    return None


def is_wanted(name: str) -> bool:
    """Whether a member's name is one of a kind that ingest reads or counts."""
    return kind_of(name) not in (None, "posts")
