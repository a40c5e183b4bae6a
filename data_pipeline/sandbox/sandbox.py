"""Isolation for generated programs, from the outside: bubblewrap around warm Python processes.

Programs are judged in two sandboxes: one runs candidates, the other the tests. Each is a
bubblewrap with namespaces of its own for users, processes, mounts, network, IPC and host name; a
root of a few read-only folders (the C library, one Python) and an empty environment; an
unprivileged user, also when root starts it; no way to make further user namespaces. `zygote.py`
then forks a further isolated child for every program. What isolation cannot be had is an error,
never a silent step down.

The limit is processor time, which the load of the machine does not change. What is stopped for
another reason is a program that waits: it is `stalled` when both processes have used next to no
processor time for `Limits.wall_seconds`.
"""

import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.bubblewrap import (
    INSTALL,
    NOBODY,
    PACKAGES_FOLDER,
    bubblewrap_command,
    find_python,
)
from data_pipeline.sandbox.memory_group import MemoryGroup, descendants, held_memory
from data_pipeline.sandbox.packages import NO_PACKAGES, Packages
from data_pipeline.sandbox.plain_values import BadFrame, receive, send
from data_pipeline.sandbox.program_test import ProgramTest

_START_SECONDS = 60.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.25
_IDLE_SHARE = 0.02  # of a processor; a program that computes gets more on any machine in use
_TEST_SHARE = 3  # a test may use so much more processor time than its program
# A numerical library that starts a thread for each processor would use up the job's processes.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the order of sets must not depend on the process
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# The modules are sent and not mounted: the checkout need not be readable for the sandbox's user.
_BOOTSTRAP = """
import json, socket, sys, types
control = socket.socket(fileno=int(sys.argv[1]))
sys.path[:] = [path for path in sys.path if path]
length = int.from_bytes(control.recv(4, socket.MSG_WAITALL), "big")
setup = json.loads(control.recv(length, socket.MSG_WAITALL))
for name in ("data_pipeline", "data_pipeline.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in setup["modules"]:
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
sys.modules["data_pipeline.sandbox.zygote"].serve(
    control, setup["role"], setup["isolate"], setup["packages"], setup["folder"]
)
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Processor time of the program."""
    memory_bytes: int = 1 << 30
    """Address space of a process."""
    file_bytes: int = 16 << 20
    """Size of a file, and of /tmp."""
    processes: int = 16
    """Processes and threads, some of which are the sandbox's own."""

    @property
    def wall_seconds(self) -> float:
        """Time after which a program that uses no processor time is stopped."""
        return 3 * self.seconds

    def as_job(self) -> dict[str, int]:
        """The form that the zygote takes.

        The kernel counts `cpu` by sampling, too much on a loaded machine. It is for what a
        program's children use; the program itself is timed exactly.
        """
        return {
            "cpu": math.ceil(2 * _TEST_SHARE * self.seconds),
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
        packages: what jobs may import.

    Attributes:
        packages: versions of those that can be imported, by name.

    Raises:
        ValueError: bubblewrap or a Python for it is missing, the sandbox cannot be set up, or a
            package that is required cannot be imported in it.
    """

    def __init__(
        self, role: str, *, memory_bytes: int, isolate: bool, packages: Packages = NO_PACKAGES
    ) -> None:
        self._memory_bytes = memory_bytes
        self._control, theirs = socket.socketpair()
        self._links: tempfile.TemporaryDirectory[str] | None = None
        command = [sys.executable]
        identity: dict[str, Any] = {}
        if isolate:
            is_root = os.geteuid() == 0
            command = bubblewrap_command(find_python(is_root), packages)
            if is_root:
                identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        folder = PACKAGES_FOLDER
        if packages.entries and not isolate:
            self._links = tempfile.TemporaryDirectory(prefix="megaphi-packages-")
            folder = self._links.name
            for entry in packages.entries:
                os.symlink(entry, os.path.join(folder, entry.name))
        descriptor = theirs.fileno()
        self._group = MemoryGroup(memory_bytes)
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = subprocess.Popen(
                    [*command, "-s", "-S", "-B", "-c", _BOOTSTRAP, str(descriptor)],
                    env=_ENVIRONMENT,
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
                setup = {"role": role, "isolate": isolate, "packages": packages.names}
                send(self._control, {**setup, "modules": _modules(role), "folder": folder})
                absent = receive(self._control)["absent"]
                self._group.add(descendants(self._process.pid))
            except (BadFrame, OSError) as error:
                self.close()
                errors.seek(0)
                lines = errors.read(2000).decode("utf-8", "replace").split("\n")
                reason = " ".join(line for line in lines if line.strip())[-300:] or str(error)
                raise ValueError(f"the sandbox cannot be set up ({reason}): {INSTALL}") from None
        if absent and packages.required:
            self.close()
            name, reason = next(iter(absent.items()))
            raise ValueError(
                f"`package` {name}: the sandbox's Python cannot import it ({reason}); it runs "
                f"{command[-1]}, as a user who must be able to read the package"
            )
        self.packages = {name: v for name, v in packages.versions if name not in absent}

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

    def processor_time(self) -> float:
        """Seconds that the job has used so far, without what its own children have.

        Raises:
            SandboxBroken: the sandbox is gone or does not answer.
        """
        try:
            send(self._control, {"ask": "cpu"})
            return float(receive(self._control)["cpu"])
        except (BadFrame, OSError) as error:
            raise SandboxBroken(str(error)) from None

    def holds_too_much(self) -> bool:
        """Whether all its processes hold more than their memory, where no control group tells."""
        return self._group.path is None and held_memory(self._process.pid) > self._memory_bytes

    def ending(self) -> Ending:
        """How the job that was killed ended; nothing of it is left.

        Raises:
            SandboxBroken: the sandbox is gone or does not answer.
        """
        try:
            self._control.settimeout(_END_SECONDS)
            return Ending(**receive(self._control))
        except (BadFrame, OSError) as error:
            raise SandboxBroken(str(error)) from None

    def close(self) -> None:
        """Kill the sandbox and everything in it."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._group.close()
        if self._links is not None:
            self._links.cleanup()


def _modules(role: str) -> list[tuple[str, str]]:
    """Name and source of the modules that run inside."""
    names = ("plain_values", role, "syscall_filter", "zygote")
    return [
        (f"data_pipeline.sandbox.{name}", Path(__file__).with_name(f"{name}.py").read_text("utf-8"))
        for name in names
    ]


def describe_isolation(isolate: bool, packages: Mapping[str, str] | None = None) -> str:
    """What the results say about how programs were run."""
    given = "".join(f", {name} {version}" for name, version in (packages or {}).items())
    if not isolate:
        return "NONE: unsafe_no_sandbox" + given
    version = subprocess.run(
        ["bwrap", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return f"{version}, {find_python(os.geteuid() == 0)}{given}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one program."""

    passed: bool
    status: str
    """passed, failed (an assertion), exception, unlike (a value that the test cannot use), died,
    timeout (processor time), stalled (waited and did not end), unrunnable (the test itself)."""
    error: str
    seconds: float
    """Processor time of the program."""


class SandboxPair:
    """Judges programs one at a time, each in fresh processes.

    Args:
        limits: for each program and each test.
        isolate: False runs without a sandbox.
        packages: what programs and tests may import.

    Attributes:
        packages: versions of those that can be imported, by name.

    Raises:
        ValueError: see `Sandbox`.
    """

    def __init__(
        self, limits: Limits, *, isolate: bool = True, packages: Packages = NO_PACKAGES
    ) -> None:
        self._limits = limits
        self._isolate = isolate
        self._given = packages
        self._sandboxes: list[Sandbox] = []
        self._open()
        self.packages = self._sandboxes[0].packages

    def _open(self) -> None:
        for role in ("candidate", "judge"):
            self._sandboxes.append(
                Sandbox(
                    role,
                    memory_bytes=2 * self._limits.memory_bytes,
                    isolate=self._isolate,
                    packages=self._given,
                )
            )

    def close(self) -> None:
        """Kill both sandboxes."""
        for sandbox in self._sandboxes:
            sandbox.close()
        self._sandboxes.clear()

    def missing_modules(self, names: list[str]) -> list[str]:
        """Those of some modules that a test cannot import here.

        Raises:
            ValueError: it cannot be found out.
        """
        answer, verdict = socket.socketpair()
        judge = self._sandboxes[1]
        try:
            with answer:
                with verdict:
                    judge.submit({"imports": names}, self._limits, [verdict.fileno()])
                answer.settimeout(_START_SECONDS)
                found = receive(answer)["error"].split()
            judge.kill()
            judge.ending()
        except (SandboxBroken, BadFrame, OSError) as error:
            raise ValueError(f"the tests' imports cannot be tried: {error}") from None
        return list(found)

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
                        "modules": test.modules,
                    },
                    self._limits,
                    [to_judge.fileno(), verdict.fileno()],
                )
            message = self._wait(answer)
        candidate.kill()
        judge.kill()
        program_end, test_end = candidate.ending(), judge.ending()
        if not (program_end.started and test_end.started):
            raise ValueError(f"the isolation of a program could not be set up: {INSTALL}")
        status, error = str(message["status"]), str(message["error"])
        if program_end.cpu > self._limits.seconds:
            status, error = "timeout", f"more than {self._limits.seconds:g} s of processor time"
        return Verdict(status == "passed", status, error, round(program_end.cpu, 3))

    def _wait(self, answer: socket.socket) -> dict[str, Any]:
        """The judge's message, or what takes its place; stops a program that only waits."""
        window = self._limits.wall_seconds
        since, used = time.monotonic(), 0.0
        # a poll object and not select(): descriptors may be above 1023
        poll = select.poll()
        poll.register(answer, select.POLLIN)
        while not poll.poll(1000 * min(_POLL_SECONDS, window / 4)):
            now = time.monotonic()
            of_program, of_test = (sandbox.processor_time() for sandbox in self._sandboxes)
            if of_program > self._limits.seconds:
                return {"status": "timeout", "error": ""}
            if of_test > _TEST_SHARE * self._limits.seconds:
                error = f"the test takes more than {_TEST_SHARE * self._limits.seconds:g} s"
                return {"status": "timeout", "error": error}
            if of_program + of_test - used > _IDLE_SHARE * window:
                since, used = now, of_program + of_test
            elif now - since > window:
                return {"status": "stalled", "error": f"waited for {window:g} s"}
            if any(sandbox.holds_too_much() for sandbox in self._sandboxes):
                return {"status": "died", "error": "its processes hold too much memory"}
        try:
            answer.settimeout(_END_SECONDS)
            message: dict[str, Any] = receive(answer)
        except (BadFrame, OSError) as problem:
            message = {"status": "died", "error": f"the test's process: {problem}"}
        return message
