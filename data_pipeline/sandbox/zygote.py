"""A warm Python process in the sandbox that forks one isolated child a job.

The sandbox itself (bubblewrap) takes away the network, the file system, the environment and the
user. Inside it every job is process 1 of a process namespace of its own (when it ends, the kernel
kills whatever it left), has no capabilities, few system calls, and finds /tmp and /dev/shm empty.
It cannot see this process.

Runs on the standard library alone, on Linux.
"""

import array
import contextlib
import ctypes
import gc
import importlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable

from data_pipeline.sandbox import syscall_filter
from data_pipeline.sandbox.plain_values import receive, send

_CLONE3 = 435  # the same number on every architecture
_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

# What programs import often: paid for once instead of in every job.
_WARM = [
    "bisect",
    "collections",
    "copy",
    "datetime",
    "decimal",
    "doctest",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "typing",
]

_libc = ctypes.CDLL(None, use_errno=True)


def serve(control: socket.socket, role: str, isolate: bool) -> None:
    """Run jobs one after the other until the parent hangs up.

    Candidates run in a child each. A judge runs in this process: it holds no code of a candidate,
    and what it gets are values. A job is a frame with `limits` and what the role's `run` takes,
    followed by descriptors. The parent ends each with another frame; the answer to that has
    `started` (false: the isolation could not be set up and nothing ran) and `cpu` (seconds).

    Args:
        control: the connection to the parent.
        role: module of this room whose `run(job, descriptors)` is the job.
        isolate: in bubblewrap; else there are only limits and a process group for each job.
    """
    run = importlib.import_module(f"data_pipeline.sandbox.{role}").run
    for name in _WARM:
        importlib.import_module(name)
    if role == "judge":
        _serve_here(control, run, isolate)
        return
    scratch = _Scratch() if isolate else None
    filtered = syscall_filter.build() if isolate else None
    gc.collect()
    gc.freeze()
    send(control, {"ready": True})
    while True:
        job = receive(control)
        descriptors = _receive_descriptors(control, job["descriptors"])
        if scratch is not None:
            scratch.renew(job["limits"]["files"])
        gate, started = os.pipe()
        pid = _clone() if isolate else os.fork()
        if pid == 0:
            try:
                control.close()
                os.close(gate)
                _confine(job["limits"])
                if filtered is not None:
                    _drop_capabilities()
                    syscall_filter.install(filtered)
                os.write(started, b"1")
                os.close(started)
                run(job, descriptors)
            finally:
                os._exit(0)
        for descriptor in (started, *descriptors):
            os.close(descriptor)
        is_started = os.read(gate, 1) == b"1"
        os.close(gate)
        receive(control)
        _kill(pid, isolate)
        _, _, usage = os.wait4(pid, 0)
        send(control, {"started": is_started, "cpu": usage.ru_utime + usage.ru_stime})


def _serve_here(control: socket.socket, run: Callable[..., None], isolate: bool) -> None:
    """Run a judge's jobs in this process, which is confined before the first."""
    gc.freeze()
    send(control, {"ready": True})
    confined = False
    while True:
        job = receive(control)
        descriptors = _receive_descriptors(control, job["descriptors"])
        if not confined:
            # the parent's clock stops a test, and with it this process
            _confine({**job["limits"], "cpu": resource.RLIM_INFINITY})
            if isolate:
                _drop_capabilities()
                syscall_filter.install(syscall_filter.build())
            confined = True
        before = time.process_time()
        run(job, descriptors)
        receive(control)
        send(control, {"started": True, "cpu": time.process_time() - before})


def _receive_descriptors(control: socket.socket, count: int) -> list[int]:
    """The file descriptors that follow a job, on a frame of one byte."""
    found = array.array("i")
    _, ancillary, _, _ = control.recvmsg(1, socket.CMSG_LEN(count * found.itemsize))
    for _, _, data in ancillary:
        found.frombytes(data)
    return list(found)


class _Scratch:
    """The folders that a job may write to; each job finds them new."""

    def __init__(self) -> None:
        self._changed: dict[str, int] = {}
        _checked(_libc.unshare(_CLONE_NEWNS))

    def renew(self, size: int) -> None:
        """Mount anew what has been touched since the last time; nobody is in it any more."""
        for folder in ("/tmp", "/dev/shm"):
            # entries, permissions, attributes: no change leaves the time of change as it was
            if self._changed.get(folder) == os.stat(folder).st_ctime_ns:
                continue
            path = folder.encode()
            if folder in self._changed:
                _checked(_libc.umount2(path, _MNT_DETACH))
            flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
            options = f"size={size},nr_inodes=1000".encode()
            _checked(_libc.mount(b"tmpfs", path, b"tmpfs", flags, options))
            self._changed[folder] = os.stat(folder).st_ctime_ns


def _clone() -> int:
    """Fork into a new process namespace.

    `unshare` would not do: a process can call it only once for its children's process namespace.
    """
    api = ctypes.pythonapi  # keeps the interpreter's lock across the call
    arguments = (ctypes.c_uint64 * 8)(_CLONE_NEWPID, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    api.PyOS_BeforeFork()
    pid = int(syscall(_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments)))
    if pid == 0:
        api.PyOS_AfterFork_Child()
    else:
        api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pid


def _confine(limits: dict[str, int]) -> None:
    """Set the limits of a job; raises `OSError` if that fails."""
    os.setsid()
    os.chdir("/tmp")
    for name, value in (
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_CPU", limits["cpu"]),
        ("RLIMIT_FSIZE", limits["files"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _drop_capabilities() -> None:
    """Give up all privileges over the sandbox's namespaces."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)))


def _checked(result: int) -> None:
    """Raise the error of a failed system call."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _kill(pid: int, isolate: bool) -> None:
    """Kill a job; with it, as process 1, all of its namespace, or else its process group."""
    if not isolate:
        with contextlib.suppress(ProcessLookupError):  # it ended before it had a group
            os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
