"""Sees every change that this process makes to the files below a directory, and may disturb it.

Python's own ways to the file system are replaced: `open`, the functions of `os` that change
something, and `os.fsync`. What does not pass through them (a C library that opens files by itself)
would be missed; `tests.faults.disk_model` notices that, because the disk that it rebuilds from the
calls is then another than the real one.
"""

import builtins
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True, kw_only=True)
class Call:
    """One change: made by which process, to what, and when."""

    kind: str
    """create, truncate, write, sync, mkdir, rename, unlink or rmdir; nothing if it failed."""
    path: str
    """Relative to the watched directory."""
    process: int
    target: str = ""
    """What a rename makes of the path."""
    offset: int = 0
    data: bytes = b""
    """What a write writes at the offset."""
    nanoseconds: int = 0
    """Monotonic clock when it was done: orders the calls of all processes of this machine."""


Disturb = Callable[[int, Call, Callable[[], Any]], None]
"""Called before each call with its number from 0, the call, and what does it (for half a write,
the half). It may return, raise an `OSError`, or end the process."""


class _WatchedFile(io.FileIO):
    """An unbuffered file that is written to under watch."""

    def __init__(self, watch: "_Watch", path: str, mode: str) -> None:
        self._watch = watch
        exists = os.path.exists(path)
        kind = "truncate" if exists else "create"
        if exists and "w" not in mode:
            super().__init__(path, mode)
            return
        watch.do(kind, path, lambda: io.FileIO.__init__(self, path, mode))

    def write(self, block: Any) -> int:
        """Write what one system call takes."""
        data = bytes(block)
        write = super().write
        half = data[: len(data) // 2]
        return int(
            self._watch.do(
                "write",
                str(self.name),
                lambda: write(data),
                half=lambda: write(half),
                offset=self.tell(),
                data=data,
            )
        )


class _Watch:
    """What has been done so far, and how to do more."""

    def __init__(self, root: Path, process: int, disturb: Disturb | None) -> None:
        self.root = os.path.abspath(root)
        self.process = process
        self.disturb = disturb
        self.calls: list[Call] = []
        self.count = 0

    def inside(self, path: str) -> bool:
        """Whether a path is the watched directory or below it."""
        return path == self.root or path.startswith(self.root + os.sep)

    def do(
        self,
        kind: str,
        path: str,
        action: Callable[[], Any],
        half: Callable[[], Any] | None = None,
        target: str = "",
        **details: Any,
    ) -> Any:
        """Do something under watch, or just do it if it is elsewhere."""
        path = os.path.abspath(path)
        if not self.inside(path):
            return action()
        call = Call(
            kind=kind,
            path=os.path.relpath(path, self.root),
            target=target and os.path.relpath(os.path.abspath(target), self.root),
            process=self.process,
            **details,
        )
        number, self.count = self.count, self.count + 1
        if self.disturb is not None:
            self.disturb(number, call, half or (lambda: None))
        try:
            result = action()
        except OSError:
            self.calls.append(replace(call, kind="nothing"))
            raise
        self.calls.append(replace(call, nanoseconds=time.monotonic_ns()))
        return result


def _absolute(path: Any, dir_fd: int | None = None) -> str:
    """The path that a call means."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
    return os.path.join(folder, os.fspath(path))


@contextlib.contextmanager
def watch_files(
    root: Path, process: int = 0, disturb: Disturb | None = None
) -> Iterator[list[Call]]:
    """Record the changes below `root`, in order; syncs are recorded and not done."""
    watch = _Watch(root, process, disturb)
    real_open, real = io.open, {name: getattr(os, name) for name in _CHANGING}

    def watched_open(
        file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any
    ) -> Any:
        writes = bool(set(mode) & set("wax+"))
        if isinstance(file, int) or not writes or not watch.inside(os.path.abspath(file)):
            return real_open(file, mode, buffering, *rest, **more)
        assert "+" not in mode, "reading and writing at once is not watched"
        raw = _WatchedFile(watch, os.path.abspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

    def one_path(name: str, kind: str) -> Callable[..., Any]:
        def watched(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> Any:
            action = lambda: real[name](path, *rest, dir_fd=dir_fd, **more)  # noqa: E731
            return watch.do(kind, _absolute(path, dir_fd), action)

        return watched

    def rename(name: str) -> Callable[..., Any]:
        def watched(source: Any, target: Any) -> Any:
            action = lambda: real[name](source, target)  # noqa: E731
            return watch.do("rename", _absolute(source), action, target=_absolute(target))

        return watched

    def os_open(path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        action = lambda: real["open"](path, flags, *rest, dir_fd=dir_fd)  # noqa: E731
        absolute = _absolute(path, dir_fd)
        if not flags & os.O_CREAT or os.path.exists(absolute):
            return int(action())
        return int(watch.do("create", absolute, action))

    def fsync(descriptor: Any) -> None:
        watch.do("sync", _absolute(descriptor), lambda: None)

    def sendfile(target: int, source: int, offset: int, count: int) -> int:
        data = os.pread(source, count, offset)
        if not data:
            return 0
        return int(
            watch.do(
                "write",
                _absolute(target),
                lambda: os.write(target, data),
                half=lambda: os.write(target, data[: len(data) // 2]),
                offset=os.lseek(target, 0, os.SEEK_CUR),
                data=data,
            )
        )

    def unexpected(name: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **more: Any) -> Any:
            paths = [a for a in arguments if isinstance(a, str | os.PathLike)]
            assert not any(watch.inside(os.path.abspath(p)) for p in paths), f"os.{name} is new"
            return real[name](*arguments, **more)

        return watched

    replacements: dict[str, Any] = {
        "mkdir": one_path("mkdir", "mkdir"),
        "rmdir": one_path("rmdir", "rmdir"),
        "unlink": one_path("unlink", "unlink"),
        "remove": one_path("remove", "unlink"),
        "rename": rename("rename"),
        "replace": rename("replace"),
        "open": os_open,
        "fsync": fsync,
        "sendfile": sendfile,
        **{name: unexpected(name) for name in ("link", "symlink", "truncate")},
    }
    with (
        mock.patch.multiple(os, **replacements),
        mock.patch.object(io, "open", watched_open),
        mock.patch.object(builtins, "open", watched_open),
    ):
        yield watch.calls


_CHANGING = (
    *("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "open", "fsync"),
    "sendfile",
    *("link", "symlink", "truncate"),
)
