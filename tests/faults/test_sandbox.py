"""Hostile programs: none reaches the machine, outlives its run, or is scored as a pass by forging.

Each escape that is harmless outside is also run there and succeeds, which shows that the program
does what it says; each forgery is shown to fool a runner that executes program and test together.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.sandbox.executor import judge_all
from data_pipeline.sandbox.memory_group import MemoryGroup, descendants
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair, Verdict
from tests.faults.hostile_programs import (
    ESCAPES,
    FLOOD,
    FORGERIES,
    HONEST,
    INSIDE_ONLY,
    INSIDERS,
    TEST,
)
from tools.cli import main

LIMITS = Limits(seconds=1.0, memory_bytes=512 << 20)
SLACK = 60.0  # a hang, and not a busy machine
SUITE = '{"task_id": "1", "prompt": "def f():\\n", "entry_point": "f", "test": "def check(f):\\n    f()\\n", "canonical_solution": "    return 1\\n"}\n'  # noqa: E501


def sandbox_problem() -> str:
    """Why bubblewrap cannot be used here; empty if it can."""
    try:
        SandboxPair(LIMITS).close()
    except ValueError as error:
        return str(error)
    return ""


PROBLEM = sandbox_problem()
needs_sandbox = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM or "there is one")


@pytest.fixture(scope="module")
def pair() -> Iterator[SandboxPair]:
    pair = SandboxPair(LIMITS)
    yield pair
    pair.close()


def ask(pair: SandboxPair, program: str, call: str = "f()", equal: str = "True") -> Verdict:
    """Judge a program by one comparison."""
    test = ProgramTest(code=f"assert {call} == {equal}\n")
    return pair.judge(textwrap.dedent(program), test)


def bubblewraps() -> set[int]:
    """The processes of bubblewrap itself below this one."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):  # it ended while we looked
            if Path(f"/proc/{pid}/comm").read_text() == "bwrap\n":
                found.add(pid)
    return found


def sandbox_processes() -> set[int]:
    """The processes of all sandboxes that this one has."""
    return set().union(*map(descendants, bubblewraps()))


def answer_pings(echo: socket.socket) -> None:
    """Send every datagram back until an empty one comes."""
    with echo:
        while True:
            data, sender = echo.recvfrom(9)
            if not data:
                return
            echo.sendto(data, sender)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A port and a folder of this machine that a program must not reach."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("secret")
    for part in (folder, folder.parent, folder.parent.parent):
        part.chmod(0o777)
    families = (socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX)
    server, unix, abstract = (socket.socket(family) for family in families)
    server.bind(("127.0.0.1", 0))
    server.listen(50)
    port = server.getsockname()[1]
    unix.bind(str(folder / "unix"))
    (folder / "unix").chmod(0o777)
    abstract.bind(f"\0megaphi-test-{port}")
    for listener in (unix, abstract):
        listener.listen(50)
    os.environ["MEGAPHI_TEST_KEY"] = "secret"
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("127.0.0.1", port))
    threading.Thread(target=answer_pings, args=(echo,), daemon=True).start()
    yield port, folder
    del os.environ["MEGAPHI_TEST_KEY"]
    echo.sendto(b"", ("127.0.0.1", port))
    for listener in (server, unix, abstract):
        listener.close()


@needs_sandbox
@pytest.mark.parametrize("name", [*ESCAPES, *INSIDE_ONLY])
def test_escape_fails_and_leaves_nothing(
    pair: SandboxPair, host: tuple[int, Path], name: str
) -> None:
    port, folder = host
    before = sorted(path.name for path in folder.iterdir())
    idle = sandbox_processes()
    program = (ESCAPES | INSIDE_ONLY)[name]
    started = time.monotonic()
    verdict = ask(pair, program, f"f({port}, {str(folder)!r})")
    assert time.monotonic() - started < LIMITS.wall_seconds + SLACK
    assert not verdict.passed, verdict
    # the sandbox itself has survived, and nothing of the program has
    assert sandbox_processes() == idle
    assert sorted(path.name for path in folder.iterdir()) == before
    clean = "import os\ndef f():\n    return os.listdir('/tmp') + os.listdir('/dev/shm') == []"
    assert ask(pair, clean).passed


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_works_outside(host: tuple[int, Path], name: str) -> None:
    port, folder = host
    code = f"{textwrap.dedent(ESCAPES[name])}\nassert f({port}, {str(folder)!r}) is True"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    (folder / "written").unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr.decode()


@needs_sandbox
def test_output_goes_nowhere(pair: SandboxPair) -> None:
    """A gigabyte of output costs neither memory nor the verdict."""
    assert ask(pair, FLOOD).passed


@needs_sandbox
def test_children_do_not_outlive_their_program(pair: SandboxPair) -> None:
    program = """
        import os, signal, time
        def f():
            for _ in range(3):
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                        while True:
                            time.sleep(1)
                    os._exit(0)
            return True
    """
    idle = sandbox_processes()
    assert ask(pair, program).passed
    assert sandbox_processes() == idle


@needs_sandbox
def test_memory_of_all_processes_together(pair: SandboxPair) -> None:
    """Children of a program are counted with it: here four of 400 MB, of 1 GiB for all."""
    group = MemoryGroup(1 << 30)
    if group.path is None:
        pytest.skip("no control group for memory can be made here")
    group.close()
    program = """
        import os, time
        def f():
            children = []
            for _ in range(4):
                reader, writer = os.pipe()
                if os.fork() == 0:
                    held = b"x" * (400 << 20)
                    os.write(writer, b"1")
                    time.sleep(60)
                os.close(writer)
                children.append(reader)
            return sum(len(os.read(reader, 1)) for reader in children)
    """
    small = program.replace("400 <<", "40 <<")
    assert ask(pair, small, equal="4").passed
    assert not ask(pair, program, equal="4").passed
    assert ask(pair, small, equal="4").passed


@needs_sandbox
def test_endless_test_is_stopped(pair: SandboxPair) -> None:
    """The suite's own code does not end; the next program is judged as ever."""
    started = time.monotonic()
    test = ProgramTest(code="assert f()\nwhile True:\n    pass\n")
    verdict = pair.judge("def f():\n    return True", test)
    assert (verdict.passed, verdict.status) == (False, "timeout")
    assert time.monotonic() - started < LIMITS.wall_seconds + SLACK
    assert ask(pair, "def f():\n    return True").passed


@needs_sandbox
def test_judge_keeps_nothing_of_a_program(pair: SandboxPair) -> None:
    """What one test defines, draws or imports under another name is not there for the next."""
    test = ProgramTest(code="import random\nleft = random.random()\nassert f(left) == left\n")
    seen = ProgramTest(code="assert f('left' in globals()) is False\n")
    same = "def f(x):\n    return x\n"
    drawn = ProgramTest(code="import random\nassert f(random.random()) == 0.8444218515250481\n")
    assert [pair.judge(same, t).passed for t in (test, seen, drawn, drawn)] == [True] * 4


@needs_sandbox
def test_program_runs_as_nobody_with_no_capability(pair: SandboxPair) -> None:
    program = """
        import ctypes, os
        def f():
            header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[7] * 6)
            assert ctypes.CDLL(None).capget(header, data) == 0
            return list(data), os.getresuid(), os.getpid()
    """
    assert ask(pair, program, equal="([0] * 6, (65534,) * 3, 1)").passed


@needs_sandbox
def test_broken_sandbox_is_replaced() -> None:
    others, other_processes = bubblewraps(), sandbox_processes()
    pair = SandboxPair(LIMITS)
    try:
        broken = bubblewraps() - others
        assert len(broken) >= 2
        for pid in broken:
            os.kill(pid, signal.SIGKILL)
        assert ask(pair, "def f():\n    return True").passed
        left = sandbox_processes() - other_processes
        assert len(left) >= 4
    finally:
        pair.close()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in left):
        assert time.monotonic() < deadline, "the sandbox's processes are still there"
        time.sleep(0.01)


@needs_sandbox
def test_killed_evaluation_leaves_no_process(tmp_path: Path) -> None:
    suite, rows = tmp_path / "suite.jsonl", tmp_path / "rows.jsonl"
    suite.write_text(SUITE)
    rows.write_text('{"task_id": "1", "completion": "    while True: pass\\n"}\n')
    command = [sys.executable, "-m", "megaphi", "evaluate", "--completions", str(rows)]
    command += ["--suite", str(suite), "--out", str(tmp_path / "out"), "--timeout", "60"]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    # bwrap, its first process and Python twice, and the program
    while len(below := descendants(child.pid) - {child.pid}) < 7:
        assert time.monotonic() < deadline, below
        time.sleep(0.02)
    child.kill()
    child.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in below):
        assert time.monotonic() < deadline, "processes outlive the evaluation"
        time.sleep(0.02)
    # the control groups that it could not remove are removed by the next
    SandboxPair(LIMITS).close()
    group = MemoryGroup(1 << 30)
    if group.path is not None:
        assert not list(group.path.parent.glob(f"megaphi-{child.pid}-*"))
    group.close()


def judged(pair: SandboxPair, program: str) -> Verdict:
    test = ProgramTest(code=f"{TEST}\ncheck(f)\n", entry_point="f")
    return pair.judge(textwrap.dedent(program), test)


@needs_sandbox
@pytest.mark.parametrize("name", [*FORGERIES, *INSIDERS])
def test_forgery_fails(pair: SandboxPair, name: str) -> None:
    verdict = judged(pair, {**FORGERIES, **INSIDERS}[name])
    assert not verdict.passed, verdict
    assert judged(pair, HONEST).passed


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_fools_a_naive_runner(tmp_path: Path, name: str) -> None:
    def passes(program: str) -> bool:
        path = tmp_path / "run.py"
        path.write_text(f"{textwrap.dedent(program)}\n{TEST}\ncheck(f)\n")
        return not subprocess.run(
            [sys.executable, path], capture_output=True, check=False
        ).returncode

    assert passes(FORGERIES[name])
    assert passes(HONEST)
    assert not passes("def f(n):\n    return 0")


@needs_sandbox
def test_same_verdicts_with_one_and_eight_lanes() -> None:
    programs = [
        HONEST,
        "def f(n):\n    return list({'a', 'b', 'c', 'd'})",
        "def f(n",
        *FORGERIES.values(),
    ]
    programs += [textwrap.dedent(text) for text in INSIDERS.values()]
    test = ProgramTest(code=f"{TEST}\ncheck(f)\n", entry_point="f")
    jobs = [(number, textwrap.dedent(text), test) for number, text in enumerate(programs)]
    found = []
    for workers in (1, 8):
        verdicts = judge_all(jobs, workers=workers, limits=LIMITS, isolate=True)
        found.append({key: (v.passed, v.status, v.error) for key, v in verdicts})
    assert found[0] == found[1]
    assert [key for key, value in found[0].items() if value[0]] == [0]


@needs_sandbox
def test_verdict_under_load() -> None:
    """A busy machine makes a program slow, not wrong: time to wait is beyond processor time."""
    code = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    pair = SandboxPair(Limits(seconds=20.0))
    load = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    try:
        program = """
            import time
            def f():
                while time.process_time() < 0.5:
                    pass
                return True
        """
        assert ask(pair, program).passed
    finally:
        pair.close()
        for process in load:
            process.kill()
            process.wait()


def test_refuses_without_bubblewrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "suite.jsonl").write_text(SUITE)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["evaluate", "--canonical", "--suite", str(tmp_path / "suite.jsonl")]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "bwrap not found" in said
    assert "apt-get install bubblewrap" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--unsafe-no-sandbox"]) == 0
    assert "isolation: NONE" in capsys.readouterr().out


def test_refuses_where_bubblewrap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that forbids user namespaces."""
    (tmp_path / "suite.jsonl").write_text(SUITE)
    fake = tmp_path / "bwrap"
    shell = shutil.which("sh")
    fake.write_text(
        f"#!{shell}\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    # a sandbox that root starts runs as nobody, who must be able to see it
    for part in (tmp_path, *tmp_path.parents):
        if part == Path(tempfile.gettempdir()):
            break
        part.chmod(0o777)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["evaluate", "--canonical", "--suite", str(tmp_path / "suite.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "No permissions to create new namespace" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    fake.write_text("not a program")
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "the sandbox cannot be started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
