"""A process for work that hostile text may kill: parsing, above all.

CPython says that its parser and the functions of `ast` can crash the interpreter, and a regular
expression can run for ever. So such work runs in a child that a document may take down: the child
arms a timer of CPU seconds before each document, whose signal ends it even inside C code, and lives
under a memory limit. The parent sees the pipe close and starts another child for the next document.

The limits are in CPU seconds and bytes of address space, not in wall time, so that a busy machine
changes no verdict; they are far above what any document of a corpus needs.
"""

import importlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from data_pipeline.records.record import Json

CPU_SECONDS = 20.0  # of one document; ordinary ones take milliseconds
MEMORY_BYTES = 2 * 2**30  # address space of the child above what it starts with
_LENGTH = struct.Struct("<Q")
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from data_pipeline.runner.disposable_worker import serve; serve(sys.argv[2])"
)


class WorkerDied(Exception):
    """The child did not survive a document; `str()` says what it died of."""


class DisposableWorker:
    """Calls a function of one JSON value in a child process that may die.

    Args:
        function: `module:name` of the function; it takes and returns JSON values.
        cpu_seconds: limit of one call.
        memory_bytes: address space of the child, above what its imports take.
    """

    def __init__(
        self,
        function: str,
        *,
        cpu_seconds: float = CPU_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._function = function
        self._limits = [str(cpu_seconds), str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "DisposableWorker":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()  # an interrupted caller must not wait for the document
        self.close()

    def call(self, value: Json) -> Json:
        """The function's result.

        Raises:
            WorkerDied: the child died of this value.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, value)
            return _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            self.close()
            raise WorkerDied(_cause(process.returncode)) from None

    def _start(self) -> subprocess.Popen[bytes]:
        path = [entry or os.getcwd() for entry in sys.path]
        arguments = [json.dumps(path), self._function, *self._limits]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which closes the pipe
        )
        return self._process

    def close(self) -> None:
        """End the child."""
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        self._process.wait()
        self._process = None


def _cause(status: int) -> str:
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return "it took too many CPU seconds"
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _send(stream: BinaryIO | Any, value: Json) -> None:
    data = json.dumps(value).encode("ascii")
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Json:
    """Read one value.

    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return json.loads(data)


def serve(function: str) -> None:
    """The child: answer calls on stdin until it closes."""
    cpu_seconds, memory_bytes = float(sys.argv[3]), int(sys.argv[4])
    module, name = function.split(":")
    answer: Callable[[Json], Json] = getattr(importlib.import_module(module), name)
    warnings.simplefilter("ignore")  # of invalid escapes and the like in the documents
    # Numerical libraries reserve address space by the number of cores when they are imported.
    with open("/proc/self/statm", encoding="ascii") as stream:
        memory_bytes += int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            value = _receive(requests)
        except EOFError:
            return
        # SIGPROF has no handler here: its default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        result = answer(value)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, result)
