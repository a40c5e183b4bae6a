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
import sys
import time

from data_pipeline.sandbox import syscall_filter
from data_pipeline.sandbox.plain_values import receive, send

_CLONE3 = 435  # the same number on every architecture
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096
_MNT_DETACH = 2
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_CPUCLOCK_SCHED = 2

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

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

_libc = ctypes.CDLL(None, use_errno=True)


def serve(
    control: socket.socket, role: str, isolate: bool, packages: list[str], folder: str
) -> None:
    """Run jobs one after the other until the parent hangs up, in a child each.

    A job is a frame with `limits` and what the role's `run` takes, followed by descriptors. While
    it runs, a frame `{"ask": "cpu"}` is answered with `cpu`, its processor time so far in seconds.
    The parent ends each job with an empty frame; the answer to that has `started` (false: the
    isolation could not be set up and nothing ran) and `cpu`.

    Args:
        control: the connection to the parent.
        role: module of this room whose `run(job, descriptors)` is the job.
        isolate: in bubblewrap; else there are only limits and a process group for each job.
        packages: modules to import before the first job, besides those of the standard library.
        folder: where they are.
    """
    run = importlib.import_module(f"data_pipeline.sandbox.{role}").run
    for name in _WARM:
        importlib.import_module(name)
    absent = _import_packages(packages, folder)
    os.environ.clear()
    scratch = _Scratch() if isolate else None
    filtered = syscall_filter.build() if isolate else None
    gc.collect()
    gc.freeze()
    send(control, {"ready": True, "absent": absent})
    while True:
        job = receive(control)
        descriptors = _receive_descriptors(control, job["descriptors"])
        if scratch is not None:
            scratch.renew(job["limits"]["files"])
        gate, started = os.pipe()
        pid = _clone() if isolate else os.fork()
        if pid == 0:
            try:
                _open_nothing_but([started, *descriptors])
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
        while receive(control):
            send(control, {"cpu": _processor_time(pid)})
        _kill(pid, isolate)
        _, _, usage = os.wait4(pid, 0)
        send(control, {"started": is_started, "cpu": usage.ru_utime + usage.ru_stime})


def _import_packages(names: list[str], folder: str) -> dict[str, str]:
    """Import packages; returns why not, for those that cannot be."""
    absent = {}
    if names:
        sys.path.append(folder)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package does when it is imported
            absent[name] = f"{type(error).__name__}: {error}"[:300]
    return absent


def _open_nothing_but(kept: list[int]) -> None:
    """Close what this process has open; /dev/null is opened anew for input, output and errors.

    A description that was open before the fork would be shared with every other job: its offset
    and its flags, and what is written to it.
    """
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for descriptor in (0, 1, 2):
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, descriptor)
        os.close(null)


def _processor_time(pid: int) -> float:
    """Seconds that a child has used; the clock of a process is numbered by its identity."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


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
        # A network in which nothing is up: on a loopback interface the ports of a connection that
        # has ended stay taken for a minute, which the next job would see.
        _checked(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET))
        for path in ("/dev/pts", *(f"/dev/{name}" for name in _DEVICES)):
            _protect(path)

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


def _protect(path: str) -> None:
    """Mount a device read-only: it can be written to as ever, but its times and mode stay.

    They are those of the machine's own device, which every other sandbox sees.
    """
    kept = os.statvfs(path).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept
    _checked(_libc.mount(None, path.encode(), None, flags, None))


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
