"""Isolation for generated programs, from the outside: bubblewrap around warm Python processes.

A lane is two sandboxes: one runs candidates, the other the tests. Each is a bubblewrap with
namespaces of its own for users, processes, mounts, network, IPC and host name; a root of a
few read-only folders (the C library, one Python) and an empty environment; an unprivileged user,
also when root starts it; no way to make further user namespaces. `zygote.py` then forks a
further isolated child for every program. What isolation cannot be had is an error, never a silent
step down.
"""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.memory_group import MemoryGroup, descendants
from data_pipeline.sandbox.plain_values import BadFrame, receive, send
from data_pipeline.sandbox.program_test import ProgramTest

INSTALL = (
    "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install "
    "bubblewrap) where user namespaces are allowed, or give --unsafe-no-sandbox to run "
    "model-written code with your own rights"
)
NOBODY = 65534
_START_SECONDS = 60.0
_END_SECONDS = 10.0
_GRACE_SECONDS = 1.0
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib")
_LINKED = ("/lib", "/lib64", "/lib32")

# The modules are sent and not mounted: the checkout need not be readable for the sandbox's user.
_BOOTSTRAP = """
import json, os, socket, sys, types
control = socket.socket(fileno=int(sys.argv[1]))
os.environ.clear()
sys.path[:] = [path for path in sys.path if path]
length = int.from_bytes(control.recv(4, socket.MSG_WAITALL), "big")
setup = json.loads(control.recv(length, socket.MSG_WAITALL))
for name in ("data_pipeline", "data_pipeline.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in setup["modules"]:
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.modules["data_pipeline.sandbox.zygote"].serve(control, setup["role"], setup["isolate"])
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Processor time of a process; three times this in all, asleep or not."""
    memory_bytes: int = 1 << 30
    """Address space of a process."""
    file_bytes: int = 16 << 20
    """Size of a file, and of /tmp."""
    processes: int = 16
    """Processes and threads, some of which are the sandbox's own."""

    @property
    def wall_seconds(self) -> float:
        """Time until a program is stopped; longer than its processor time, for loaded machines."""
        return 3 * self.seconds

    def as_job(self) -> dict[str, int]:
        """The form that the zygote takes."""
        return {
            "cpu": max(1, -int(-self.seconds // 1)),
            "memory": self.memory_bytes,
            "files": self.file_bytes,
            "processes": self.processes,
        }


class SandboxBroken(Exception):
    """A sandbox has ended or does not answer; another must be started."""


@dataclass(frozen=True)
class Ending:
    """How a job ended: whether it had started, its processor time in seconds."""

    started: bool
    cpu: float


class Sandbox:
    """A warm process that runs jobs of one role, one at a time.

    The thread that makes it must outlive it (the kernel ends the sandbox with the thread).

    Args:
        role: `candidate` or `judge`, the module whose `run` is the job.
        memory_bytes: of all its processes together, where the machine can limit that.
        isolate: use bubblewrap; False runs the same without isolation.

    Raises:
        ValueError: bubblewrap or a Python for it is missing, or the sandbox cannot be set up.
    """

    def __init__(self, role: str, *, memory_bytes: int, isolate: bool) -> None:
        self._control, theirs = socket.socketpair()
        command = [sys.executable]
        identity: dict[str, Any] = {}
        if isolate:
            is_root = os.geteuid() == 0
            command = bubblewrap_command(find_python(is_root))
            if is_root:
                identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        descriptor = theirs.fileno()
        self._group = MemoryGroup(memory_bytes)
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = subprocess.Popen(
                    [*command, "-s", "-S", "-B", "-c", _BOOTSTRAP, str(descriptor)],
                    # the order of sets must not depend on the process
                    env={"PYTHONHASHSEED": "0"},
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=[descriptor],
                    **identity,
                )
            except OSError as error:
                theirs.close()
                self._control.close()
                self._group.close()
                raise ValueError(f"the sandbox cannot be started ({error}): {INSTALL}") from None
            theirs.close()
            try:
                self._control.settimeout(_START_SECONDS)
                send(self._control, _setup(role, isolate))
                receive(self._control)
                self._group.add(descendants(self._process.pid))
            except (BadFrame, OSError) as error:
                self.close()
                errors.seek(0)
                said = errors.read(2000).decode("utf-8", "replace").split("\n")
                reason = " ".join(line for line in said if line.strip())[-300:] or str(error)
                raise ValueError(f"the sandbox cannot be set up ({reason}): {INSTALL}") from None

    def submit(self, job: dict[str, Any], limits: Limits, descriptors: list[int]) -> None:
        """Start a job; the descriptors are duplicated into it.

        Raises:
            SandboxBroken: the sandbox is gone.
        """
        frame = {**job, "limits": limits.as_job(), "descriptors": len(descriptors)}
        try:
            self._control.settimeout(_END_SECONDS)
            send(self._control, frame)
            socket.send_fds(self._control, [b"d"], descriptors)
        except OSError as error:
            raise SandboxBroken(str(error)) from None

    def kill(self) -> None:
        """Have the job killed, with all that it started; `ending` waits for it.

        Raises:
            SandboxBroken: the sandbox is gone.
        """
        try:
            self._control.settimeout(_END_SECONDS)
            send(self._control, {})
        except OSError as error:
            raise SandboxBroken(str(error)) from None

    def ending(self, seconds: float = _END_SECONDS) -> Ending:
        """How the job that was killed ended, waited for so long; nothing of it is left.

        Raises:
            SandboxBroken: the sandbox is gone or does not answer.
        """
        try:
            self._control.settimeout(seconds)
            return Ending(**receive(self._control))
        except (BadFrame, OSError) as error:
            raise SandboxBroken(str(error)) from None

    def close(self) -> None:
        """Kill the sandbox and everything in it."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._group.close()


def _setup(role: str, isolate: bool) -> dict[str, Any]:
    """What the bootstrap code waits for."""
    names = ("plain_values", role, "syscall_filter", "zygote")
    modules = [
        (f"data_pipeline.sandbox.{name}", Path(__file__).with_name(f"{name}.py").read_text("utf-8"))
        for name in names
    ]
    return {"modules": modules, "role": role, "isolate": isolate}


def bubblewrap_command(python: str) -> list[str]:
    """The sandbox's command line, up to and with the Python that runs in it.

    CAP_SYS_ADMIN is one over the sandbox's own namespaces, for the zygote, which gives it up in
    each child before a program runs.

    Raises:
        ValueError: bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise ValueError(f"bwrap not found: {INSTALL}")
    command = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    command += ["--new-session", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "sandbox"]
    for folder in _LIBRARIES:
        command += ["--ro-bind-try", folder, folder]
    for folder in _LINKED:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = _prefix(python)
    if prefix not in ("/usr", "/usr/local"):
        command += ["--ro-bind", prefix, prefix]
    real = os.path.realpath(python)
    if not real.startswith(f"{prefix}/lib/"):
        command += ["--ro-bind", real, real]
    # no /proc: there is nothing to learn about any process, and nothing to write to
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--dir", "/tmp", "--remount-ro", "/"]
    return [*command, "--chdir", "/", real]


def _prefix(python: str) -> str:
    """The installation that a Python belongs to: the folder above its `bin`."""
    return os.path.dirname(os.path.dirname(os.path.realpath(python)))


def find_python(for_nobody: bool) -> str:
    """A Python that the sandbox's user can read: our own, without the environment's packages.

    Args:
        for_nobody: root will start the sandbox as the user `nobody`.

    Raises:
        ValueError: there is none.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tried = [os.path.join(sys.base_prefix, "bin", f"python{version}")]
    tried += [f"{folder}/python3" for folder in ("/usr/local/bin", "/usr/bin")]
    for python in tried:
        real = os.path.realpath(python)
        if os.path.exists(real) and (not for_nobody or _open_to_all(real)):
            return real
    raise ValueError(
        f"no Python for the sandbox: as root it runs as the user nobody, who cannot read any of "
        f"{', '.join(tried)}; run as an ordinary user, or install python3 in /usr"
    )


def _open_to_all(path: str) -> bool:
    """Whether every user can reach and execute a file."""
    parts = [Path(path), *Path(path).parents]
    return all(part.stat().st_mode & stat.S_IXOTH for part in parts)


def describe_isolation(isolate: bool) -> str:
    """What the results say about how programs were run."""
    if not isolate:
        return "NONE: --unsafe-no-sandbox"
    version = subprocess.run(
        ["bwrap", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return f"{version}, {find_python(os.geteuid() == 0)}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one program."""

    passed: bool
    status: str
    """passed, failed (an assertion), exception, unlike (a value that the test cannot use), died,
    timeout."""
    error: str
    seconds: float
    """Processor time of the program."""


class Lane:
    """Judges programs one at a time, each in fresh processes.

    Args:
        limits: for each program and each test.
        isolate: False runs without a sandbox.

    Raises:
        ValueError: see `Sandbox`.
    """

    def __init__(self, limits: Limits, *, isolate: bool = True) -> None:
        self._limits = limits
        self._isolate = isolate
        self._sandboxes: list[Sandbox] = []
        self._open()

    def _open(self) -> None:
        for role in ("candidate", "judge"):
            self._sandboxes.append(
                Sandbox(role, memory_bytes=2 * self._limits.memory_bytes, isolate=self._isolate)
            )

    def close(self) -> None:
        """Kill both sandboxes."""
        for sandbox in self._sandboxes:
            sandbox.close()
        self._sandboxes.clear()

    def judge(self, program: str, test: ProgramTest) -> Verdict:
        """Run a program against a test.

        A sandbox that breaks is replaced and the program tried once more; the second time it is
        taken to be the program's doing.
        """
        for _ in range(2):
            try:
                return self._judge(program, test)
            except SandboxBroken:
                self.close()
                self._open()
        return Verdict(False, "died", "the sandbox ended with it, twice", 0.0)

    def _judge(self, program: str, test: ProgramTest) -> Verdict:
        candidate, judge = self._sandboxes
        to_judge, to_candidate = socket.socketpair()
        answer, verdict = socket.socketpair()
        with answer:
            with to_judge, to_candidate, verdict:
                candidate.submit({"program": program}, self._limits, [to_candidate.fileno()])
                judge.submit(
                    {
                        "test": test.code,
                        "preamble": test.whole_preamble,
                        "entry_point": test.entry_point,
                        "names": test.names,
                    },
                    self._limits,
                    [to_judge.fileno(), verdict.fileno()],
                )
            answer.settimeout(self._limits.wall_seconds)
            started = time.monotonic()
            try:
                message = receive(answer)
            except (BadFrame, TimeoutError) as problem:
                message = {"status": "died", "error": f"the test's process: {problem}"}
            late = time.monotonic() - started >= self._limits.wall_seconds
        candidate.kill()
        judge.kill()
        program_end = candidate.ending()
        try:
            test_end = judge.ending(_GRACE_SECONDS if late else _END_SECONDS)
        except SandboxBroken:
            if not late:
                raise
            # the test itself does not come to an end
            self.close()
            self._open()
            return Verdict(False, "timeout", "the test does not end", round(program_end.cpu, 3))
        if not (program_end.started and test_end.started):
            raise ValueError(f"the isolation of a program could not be set up: {INSTALL}")
        status, error = str(message["status"]), str(message["error"])
        limit = self._limits.as_job()["cpu"]
        if status == "died" and (late or max(program_end.cpu, test_end.cpu) >= limit - 0.1):
            status, error = "timeout", f"more than {self._limits.seconds:g} s"
        return Verdict(status == "passed", status, error, round(program_end.cpu, 3))
