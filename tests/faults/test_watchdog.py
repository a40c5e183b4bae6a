"""A process that stands still is named, with its step and phase, and the others end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaphi.errors import EXIT_HUNG
from megaphi.resilience.watchdog import Heartbeat, describe_hang, suspects
from tests.helpers import toy_options
from tests.layouts import Launcher


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.mark.parametrize(
    ("point", "rank", "phase"),
    [("forward", 1, "forward_backward"), ("save", 1, "save"), ("evaluate", 0, "evaluate")],
)
def test_a_stopped_process_is_named(
    point: str, rank: int, phase: str, launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """As by SIGSTOP, a debugger or a machine that is gone; also when it is the main process."""
    run_dir = tmp_path / "run"
    plan = {"point": point, "rank": rank, "step": 10, "killed_after": 6}
    run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
    # nothing is left to chance: the first step may take three times as long
    options = toy_options(toy_tokens, run_dir, train__hang_seconds=4)
    log = tmp_path / "log"
    statuses = launcher.train(options, 2, log, "tests.faults.faulty_trainings:stopped")
    printed = log.read_text()
    assert statuses[rank] == -9, printed
    assert statuses[1 - rank] == EXIT_HUNG, printed
    (line,) = [line for line in printed.splitlines() if "hang: " in line]
    assert f"rank {rank} (host" in line
    assert f"rank {1 - rank} (host" not in line
    assert f"at step 10 in {phase}: does not answer" in line
    stacks = (run_dir / "hangs" / f"rank-{1 - rank:05d}.txt").read_text()
    assert "trainer.py" in stacks  # where the survivor waits
    assert "_watch" in stacks  # and its other threads


def beat(rank: int, step: int, phase: str, hung: bool = True) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", 100 + rank, step, phase, hung)


def test_who_is_guilty() -> None:
    waiting = [beat(rank, 7, "forward_backward") for rank in range(4)]
    silent = beat(4, 6, "save", hung=False)
    assert suspects([*waiting, silent])[0] == [silent]
    behind = beat(5, 7, "data")
    assert suspects([*waiting, behind]) == ([behind], "is behind the others")
    earlier = beat(6, 6, "save")
    assert suspects([*waiting, behind, earlier])[0] == [earlier]
    everyone, reason = suspects(waiting)
    assert everyone == waiting
    assert "all processes" in reason


def test_what_is_said() -> None:
    waiting = [beat(rank, 7, "evaluate") for rank in (0, 2)]
    text = describe_hang([*waiting, beat(1, 7, "data", hung=False)], 4, 480.0)
    assert text.startswith("hang: nothing moved for 480 s; rank 1 (host node1, process 101)")
    assert "at step 7 in data: does not answer" in text
    assert text.endswith("no heartbeat of ranks [3]")
    many = [beat(rank, 3, "report", hung=False) for rank in range(9)]
    assert "rank 3 " in describe_hang(many, 9, 1.0)
    assert "and 5 more" in describe_hang(many, 9, 1.0)


def test_heartbeats_are_read_as_they_were_written() -> None:
    written = beat(3, 12, "save", hung=False)
    assert Heartbeat.decode(written.encode()) == written
    long = Heartbeat(1, "h" * 300, 1, 2, "data", True)
    assert len(long.encode()) == len(written.encode())
