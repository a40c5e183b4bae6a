"""Runs trainings of several processes one after another, without starting Python for each.

Importing torch takes seconds, a fork of a process that has done so milliseconds. `python -m
tests.layouts` imports everything once, then reads one job a line from its standard input and
answers with one line each.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tests.helpers import REPOSITORY, child_environment

_TIMEOUT_SECONDS = 240.0


class Launcher:
    """A process that starts trainings by forking itself; a context manager."""

    def __enter__(self) -> "Launcher":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.layouts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=child_environment(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def train(
        self,
        options: list[str],
        processes: int,
        log: Path,
        entry: str = "megaphi.train:main",
        errors: Path | None = None,
    ) -> list[int]:
        """Train on `processes` processes; their exit statuses.

        Their output goes to `log`, what they write to stderr to `errors` if that is another file.
        `entry` is the function that each of them calls with the options.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {
            "options": [str(option) for option in options],
            "processes": processes,
            "log": str(log),
            "errors": str(errors or log),
            "entry": entry,
        }
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the launcher died"
        statuses: list[int] = json.loads(answer)
        return statuses


@functools.cache
def shared_launcher() -> Launcher:
    """The one launcher of this test process, with which it ends."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(Launcher())


def run_training(options: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Train and wait; what `torchrun -m megaphi.train` would do, without its seconds of imports.

    The exit status is the first that is not 0, with the output of all processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "out", Path(folder) / "err"
        statuses = shared_launcher().train(options, processes, log, errors=errors)
        failed = next((status for status in statuses if status), 0)
        return subprocess.CompletedProcess(options, failed, log.read_text(), errors.read_text())


def free_port() -> int:
    """A port that nobody uses, below those that the system gives to connections by itself.

    One of those could be taken by anybody before rank 0 listens on it.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _become_trainer(job: dict[str, object], rank: int, port: int) -> None:
    """Train in this freshly forked process and leave it."""
    from megaphi.errors import run_main

    status = 70
    try:
        for name, descriptor in (("log", 1), ("errors", 2)):
            file = os.open(str(job[name]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["processes"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        module, _, function = str(job["entry"]).partition(":")
        run = getattr(importlib.import_module(module), function)
        status = run_main(run, list(job["options"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    """Exit statuses of child processes; if one fails or takes too long, the others are killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        failed = any(status != 0 for status in statuses.values())
        if (failed and deadline > time.monotonic() + 10) or time.monotonic() > deadline:
            # the others get a moment to end by themselves
            deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() >= deadline:
                for child in children:
                    if child not in statuses:
                        os.kill(child, 9)
        time.sleep(0.02)
    return [statuses[child] for child in children]


def _jobs() -> Iterator[dict[str, object]]:
    """What the parent asks for."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve jobs until standard input ends."""
    import megaphi.training.trainer  # noqa: F401  (the import is what takes long)

    for job in _jobs():
        port, children = free_port(), []
        for rank in range(int(str(job["processes"]))):
            child = os.fork()
            if child == 0:
                _become_trainer(job, rank, port)
            children.append(child)
        print(json.dumps(_wait(children)), flush=True)


if __name__ == "__main__":
    main()
