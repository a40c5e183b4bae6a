"""Nothing passes from one program to another, or from a program into the test's own names."""

import textwrap
from collections.abc import Iterator

import pytest

from data_pipeline.sandbox.executor import judge_all
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair, Verdict
from tests.isolation import needs_sandbox

pytestmark = needs_sandbox


@pytest.fixture(scope="module")
def pair() -> Iterator[SandboxPair]:
    pair = SandboxPair(Limits(seconds=1.0, memory_bytes=512 << 20))
    yield pair
    pair.close()


def ask(pair: SandboxPair, program: str, test: str = "assert f()\n") -> Verdict:
    return pair.judge(textwrap.dedent(program), ProgramTest(code=test))


# Each leaves something for the next program, which `seen` looks for.
CHANNELS = {
    "bytes on standard error": """
        import os
        def leave():
            os.write(2, b"left")
            return True
        def seen():
            return b"left" in os.pread(2, 100, 0)
    """,
    "offset of standard error": """
        import os
        def leave():
            os.lseek(2, 1 << 24, 0)
            return True
        def seen():
            return os.lseek(2, 0, 1) != 0
    """,
    "flags of standard input": """
        import fcntl, os
        def leave():
            for descriptor in (0, 1, 2):
                fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
            return True
        def seen():
            flags = [fcntl.fcntl(descriptor, fcntl.F_GETFL) for descriptor in (0, 1, 2)]
            return any(flag & (os.O_NONBLOCK | os.O_APPEND) for flag in flags)
    """,
    "times of a device": """
        import os
        def leave():
            try:
                os.utime("/dev/full")
            except OSError:
                return False
            return True
        def seen():
            return False
    """,
    "mode of a terminal": """
        import os
        def leave():
            for path in ("/dev/ptmx", "/dev/pts/ptmx"):
                try:
                    os.chmod(path, 0o123)
                except OSError:
                    pass
            return True
        def seen():
            return os.stat("/dev/pts/ptmx").st_mode & 0o777 == 0o123
    """,
    "port of a connection that has ended": """
        import errno, socket
        def leave():
            with socket.socket() as server, socket.socket() as client:
                try:
                    server.bind(("127.0.0.1", 4242))
                    server.listen()
                    client.connect(("127.0.0.1", 4242))
                    server.accept()[0].close()
                except OSError:
                    pass
            return True
        def seen():
            with socket.socket() as server:
                try:
                    server.bind(("", 4242))
                except OSError as error:
                    return error.errno == errno.EADDRINUSE
            return False
    """,
    "open descriptors": """
        import os
        def leave():
            return True
        def seen():
            # 3 is the connection to the judge
            return any(os.path.exists(f"/dev/fd/{n}") or is_open(n) for n in range(4, 100))
        def is_open(number):
            try:
                os.fstat(number)
            except OSError:
                return False
            return True
    """,
}


@pytest.mark.parametrize("name", CHANNELS)
def test_a_program_leaves_nothing_for_the_next(pair: SandboxPair, name: str) -> None:
    program = CHANNELS[name]
    for _ in range(2):
        ask(pair, program, "leave()\n")
        assert ask(pair, program, "assert seen() is False\n").passed


def test_devices_of_the_machine_stay_as_they_are(pair: SandboxPair) -> None:
    assert not ask(pair, CHANNELS["times of a device"], "assert leave()\n").passed


def test_output_before_does_not_fail_a_program(pair: SandboxPair) -> None:
    ask(pair, CHANNELS["offset of standard error"], "assert leave()\n")
    program = "import sys\ndef f():\n    sys.stderr.write('x' * 100)\n    return True\n"
    assert ask(pair, program).passed


def test_what_one_test_was_given_leaves_room_for_the_next(pair: SandboxPair) -> None:
    """A judge that keeps the values of many programs would fail the honest one in the end."""
    honest = "def f(n):\n    return list(range(n))\n"
    test = "assert f(1_000_000) == list(range(1_000_000))\n"
    assert ask(pair, honest, test).passed
    for _ in range(6):
        assert not ask(pair, "f = [999] * 3_000_000\n", "assert f(1) == 2\n").passed
        verdict = ask(pair, honest, test)
        assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("memfd", "import os\ndef f():\n    return os.memfd_create('x') >= 0\n"),
        ("netlink", "import socket\ndef f():\n    return bool(socket.socket(16, 3))\n"),
        ("packet", "import socket\ndef f():\n    return bool(socket.socket(17, 3))\n"),
        ("alg", "import socket\ndef f():\n    return bool(socket.socket(38, 5))\n"),
        ("vsock", "import socket\ndef f():\n    return bool(socket.socket(40, 1))\n"),
        ("qrtr pair", "import socket\ndef f():\n    return bool(socket.socketpair(42, 1))\n"),
    ],
)
def test_rare_system_calls_are_refused(pair: SandboxPair, name: str, program: str) -> None:
    verdict = ask(pair, program)
    assert verdict.status == "exception", verdict
    assert "OSError" in verdict.error or "PermissionError" in verdict.error, verdict


def test_common_sockets_are_not(pair: SandboxPair) -> None:
    program = """
        import asyncio, socket
        def f():
            for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
                socket.socket(family).close()
            return asyncio.run(asyncio.sleep(0, True))
    """
    assert ask(pair, program).passed


# Forms of tests that a replaced built-in or module would pass.
FORMS = {
    "set": "assert set(f(3)) == {7, 8, 9}\n",
    "isclose": "import math\nassert math.isclose(f(3), 0.5)\n",
    "module that is not imported": "assert math.isclose(f(3), 0.5)\n",
    "range": "for i in range(len(wanted := [1, 2])):\n    assert f(i) == wanted[i]\n",
    "all": "assert all(f(n) == n + 1 for n in range(4))\n",
    "any": "assert not any(f(n) != n + 1 for n in range(4))\n",
    "sorted": "assert sorted(f(3)) == [1, 2]\n",
    "function of the test": "def wanted(n):\n    return n + 1\nassert f(1) == wanted(1)\n",
    "local name of the test": "def check(g):\n    one = 1\n    assert g(0) == one\ncheck(f)\n",
    "assertRaises": "import unittest\nunittest.TestCase().assertEqual(f(1), 2)\n",
}
FORGED = """
    import builtins, sys
    server = sys.modules["data_pipeline.sandbox.candidate"]
    class Anything:
        def __getattr__(self, name):
            return self
        def __call__(self, *_, **__):
            return True
        def __iter__(self):
            return iter(())
    any_name = Anything()
    math = wanted = one = any_name
    inner = server._Server.answer
    def answer(self, request):
        if request["operation"] == "globals":
            others = ["math", "wanted", "check", "unittest"]
            names = {name: any_name for name in [*vars(builtins), *others]}
            names |= {"f": f, "__builtins__": {**names, "range": lambda *_: (), "all": len}}
            return {"value": server.encode(names, self.refer)}
        return inner(self, request)
    server._Server.answer = answer
    def f(n):
        return []
"""


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("entry_point", ["f", None])
def test_names_nobody_asked_for_stay_out(
    pair: SandboxPair, name: str, entry_point: str | None
) -> None:
    test = ProgramTest(code=FORMS[name], entry_point=entry_point)
    verdict = pair.judge(textwrap.dedent(FORGED), test)
    assert not verdict.passed, verdict


def test_the_verdict_does_not_depend_on_the_number_of_lanes() -> None:
    """0.6 of 1 s of processor time each, with more pairs than processors; and some that wait."""
    busy = (
        "import time\ndef f():\n    while time.process_time() < {}:\n        pass\n    return 1\n"
    )
    waiting = "import time\ndef f():\n    time.sleep(60)\n    return 1\n"
    programs = [busy.format(0.6)] * 5 + [busy.format(9)] * 2 + [waiting]
    jobs = [(n, program, ProgramTest(code="assert f()\n")) for n, program in enumerate(programs)]
    wanted = ["passed"] * 5 + ["timeout"] * 2 + ["stalled"]
    for workers in (1, 8):
        limits = Limits(seconds=1.0)
        found = dict(judge_all(jobs, workers=workers, limits=limits, isolate=True))
        assert [found[n].status for n in range(len(jobs))] == wanted
