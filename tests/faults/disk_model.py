"""What a disk holds after the power fails: only what was synced is sure, the rest may be anything.

POSIX promises little. The bytes of a file are safe after an fsync of the file; its name, after an
fsync of the directory; what was not synced may be there, may be gone, may be there as zeros, and
in any order. Over a network file system each host has a cache of its own, so that an fsync of one
host says nothing about bytes that another has written.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.file_calls import Call

_PAGE = 4096
Image = dict[str, bytes | None]
"""A directory: relative path to content, None for directories."""

SURVIVORS = (
    ("lost", "lost"),
    ("kept", "lost"),
    ("kept", "zeros"),
    ("lost", "kept"),
    ("newest", "kept"),
    ("random", "random"),
)
"""What of the unsynced names and of the unsynced bytes survives, in the order (names, bytes)."""
ALL = ("kept", "kept")


@dataclass(eq=False)
class _Node:
    """A file or a directory: what is safe, and the changes since, in order."""

    entries: "dict[str, _Node] | None" = None
    safe_entries: "dict[str, _Node]" = field(default_factory=dict)
    changes: "list[tuple[str, str, _Node]]" = field(default_factory=list)
    """(old name or "", new name or "", what) for what has changed in a directory."""
    safe_bytes: bytes = b""
    writes: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(process, offset, data) of what was written to a file."""


def _overlay(content: bytes, writes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """A file's bytes after some writes; what lies between is zero."""
    result = bytearray(content)
    for _, offset, data in writes:
        result.extend(bytes(max(0, offset + len(data) - len(result))))
        result[offset : offset + len(data)] = data
    return bytes(result)


class Disk:
    """A directory whose whole content is safe, and then the calls of some processes.

    Args:
        directory: what there is before the first call.
        shared_cache: the processes are on one host, where any fsync is good for all.
    """

    def __init__(self, directory: Path, shared_cache: bool = True) -> None:
        self.shared_cache = shared_cache
        self._root = self._read(directory)

    def _read(self, path: Path) -> _Node:
        if path.is_file():
            return _Node(safe_bytes=path.read_bytes())
        entries = {child.name: self._read(child) for child in sorted(path.iterdir())}
        return _Node(entries=entries, safe_entries=dict(entries))

    def _find(self, path: str) -> _Node:
        node = self._root
        for part in Path(path).parts:
            assert node.entries is not None
            node = node.entries[part]
        return node

    def apply(self, call: Call) -> None:
        """Do what a process did."""
        path = Path(call.path)
        if call.kind == "nothing":
            return
        if call.kind in ("write", "sync"):
            self._change_bytes(call)
            return
        if call.kind == "truncate":
            # only files that nobody synced are ever opened anew; their bytes are gone
            node = self._find(call.path)
            node.safe_bytes, node.writes = b"", []
            return
        folder = self._find(str(path.parent))
        assert folder.entries is not None
        if call.kind in ("create", "mkdir"):
            node = _Node(entries={} if call.kind == "mkdir" else None)
            folder.entries[path.name] = node
            folder.changes.append(("", path.name, node))
        elif call.kind == "rename":
            assert Path(call.target).parent == path.parent, "only within a directory"
            node = folder.entries.pop(path.name)
            folder.entries[Path(call.target).name] = node
            folder.changes.append((path.name, Path(call.target).name, node))
        else:
            folder.changes.append((path.name, "", folder.entries.pop(path.name)))

    def _change_bytes(self, call: Call) -> None:
        node = self._find(call.path)
        if call.kind == "write":
            for start in range(0, len(call.data), _PAGE):
                page = call.data[start : start + _PAGE]
                node.writes.append((call.process, call.offset + start, page))
        elif node.entries is not None:
            node.safe_entries, node.changes = dict(node.entries), []
        else:
            safe = [w for w in node.writes if self.shared_cache or w[0] == call.process]
            node.safe_bytes = _overlay(node.safe_bytes, safe)
            node.writes = [w for w in node.writes if w not in safe]

    def image(self, survivors: tuple[str, str], generator: random.Random) -> Image:
        """What the disk holds if the power fails now.

        Args:
            survivors: what of the unsynced names, and of the unsynced bytes, is there: `lost`,
                `kept`, `random`; of names also only the `newest` change; of bytes also `zeros`.
            generator: chooses, where it is `random`.
        """
        image: Image = {}
        self._add(image, self._root, "", survivors, generator)
        return image

    def _add(
        self, image: Image, node: _Node, path: str, survivors: tuple[str, str], rng: random.Random
    ) -> None:
        names, content = survivors
        if node.entries is None:
            share = {"lost": 0.0, "zeros": 0.0, "random": 0.5, "kept": 1.0}[content]
            writes = [
                (process, offset, page if rng.random() < share else bytes(len(page)))
                for process, offset, page in node.writes
            ]
            image[path] = _overlay(node.safe_bytes, [] if content == "lost" else writes)
            return
        if path:
            image[path] = None
        entries = dict(node.safe_entries)
        for number, (old, new, child) in enumerate(node.changes, start=1):
            newest = names == "newest" and number == len(node.changes)
            if names == "kept" or newest or (names == "random" and rng.random() < 0.5):
                if old and entries.get(old) is child:
                    del entries[old]
                if new:
                    entries[new] = child
        for name, child in sorted(entries.items()):
            self._add(image, child, f"{path}/{name}".lstrip("/"), survivors, rng)


def read_image(directory: Path) -> Image:
    """The image of a real directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def write_image(image: Image, directory: Path) -> None:
    """Make a real directory of an image."""
    directory.mkdir()
    for name, content in image.items():
        if content is None:
            (directory / name).mkdir()
        else:
            (directory / name).write_bytes(content)
