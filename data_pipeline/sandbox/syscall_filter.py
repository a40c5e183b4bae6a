"""A seccomp filter for programs: system calls that a solution never needs are refused with EPERM.

These are the ones that leave something behind for the next program (System V IPC, message queues,
keyrings), hold memory that no limit counts (memfd), reach into other processes, or have been roads
into the kernel. Sockets are those of UNIX and of the internet, and of no rarer family. The sandbox
holds without the filter; it is a second wall, and cheaper than an IPC namespace for every program.

Classic BPF over `struct seccomp_data` (nr at byte 0, architecture at byte 4, the first argument's
lower half at byte 16, as both machines are little-endian); see seccomp(2).
"""

import ctypes
import errno
import os
import platform

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _JUMP_IF_ABOVE, _RETURN = 0x20, 0x15, 0x25, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32_CALLS = 0x3FFFFFFF

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: number on x86_64, on aarch64
_SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_REFUSED = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "unshare": (272, 97),
    "setns": (308, 268),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
}


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def build() -> _Program:
    """The filter for this machine.

    Raises:
        OSError: the filter does not know the machine's system calls.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no system call filter for {machine}")
    refused, sockets = (
        [pair[machine == "aarch64"] for pair in calls.values()] for calls in (_REFUSED, _SOCKETS)
    )
    allow = _Instruction(_RETURN, 0, 0, _ALLOW)
    refuse = _Instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM)
    foreign = _Instruction(_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)
    # what a socket's family is, in lines that end there
    family = [_Instruction(_LOAD_WORD, 0, 0, 16)]
    family += [
        _Instruction(_JUMP_IF_EQUAL, len(_FAMILIES) - place, 0, number)
        for place, number in enumerate(_FAMILIES)
    ]
    family += [foreign, allow]
    lines = [
        _Instruction(_LOAD_WORD, 0, 0, 4),
        _Instruction(_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        refuse,  # a 32-bit call
        _Instruction(_LOAD_WORD, 0, 0, 0),
        _Instruction(_JUMP_IF_ABOVE, len(sockets) + len(refused) + 1, 0, _X32_CALLS),
    ]
    for place, number in enumerate(sockets):
        to_family = len(sockets) - place - 1 + len(refused) + 2
        lines.append(_Instruction(_JUMP_IF_EQUAL, to_family, 0, number))
    for place, number in enumerate(refused):
        lines.append(_Instruction(_JUMP_IF_EQUAL, len(refused) - place, 0, number))
    lines += [allow, refuse, *family]
    return _Program(len(lines), (_Instruction * len(lines))(*lines))


def install(program: _Program) -> None:
    """Filter the system calls of this process and its children, for good.

    Raises:
        OSError: the kernel refuses; `PR_SET_NO_NEW_PRIVS` must have been set.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
