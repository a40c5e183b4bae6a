"""A process that stands still is named, with its step and phase, and the others end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megaphi.config import Recipe
from megaphi.errors import EXIT_HUNG
from megaphi.resilience.watchdog import (
    SLOW_START,
    Heartbeat,
    Watchdog,
    describe_hang,
    speaker,
    suspects,
)
from tests.helpers import toy_options
from tests.layouts import Launcher


@pytest.mark.parametrize(
    ("point", "rank", "phase"),
    [("forward", 1, "forward_backward"), ("save", 1, "save"), ("evaluate", 0, "evaluate")],
)
def test_a_stopped_process_is_named(
    point: str, rank: int, phase: str, launcher: Launcher, toy_tokens: Path, tmp_path: Path
) -> None:
    """As by SIGSTOP, a debugger or a machine that is gone; also when it is the main process."""
    run_dir = tmp_path / "run"
    plan = {"point": point, "rank": rank, "step": 10}
    run_dir.with_suffix(".plan.json").write_text(json.dumps(plan))
    options = toy_options(toy_tokens, run_dir, train__hang_seconds=3)
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
    assert "watchdog.py" in stacks  # and its other threads


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


def test_the_first_that_noticed_speaks_for_all() -> None:
    silent = beat(0, 7, "forward_backward", hung=False)
    noticed = [beat(rank, 7, "forward_backward") for rank in (2, 1)]
    assert speaker([silent, *noticed]) == 1
    assert speaker([silent]) is None


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


def test_start_and_first_step_may_take_longer(tmp_path: Path) -> None:
    """Also those after a rewind."""
    step = [("forward_backward", 7), ("optimizer", 7)]
    for places, times in (
        ([], SLOW_START),
        (step, SLOW_START),
        ([*step, ("data", 8)], 1),
        ([*step, ("data", 8), ("rewind", 8), ("forward_backward", 5)], SLOW_START),
    ):
        dog = Watchdog(tmp_path, 0, 1, 1000.0)
        for place in places:
            dog.enter(*place)
        assert dog.limit() == 1000 * times, places
        dog.close()
    assert SLOW_START > 1


def test_a_machine_that_was_suspended_has_not_hung(launcher: Launcher, tmp_path: Path) -> None:
    """An hour goes by at one look of the watchdog, by a clock that nobody can set."""
    log, entry = tmp_path / "log", "tests.faults.faulty_trainings:suspended"
    assert launcher.train([str(tmp_path)], 1, log, entry) == [0], log.read_text()


def test_a_stuck_interpreter_ends_as_well(launcher: Launcher, tmp_path: Path) -> None:
    """Where the watchdog's own thread no longer runs; the stack says where."""
    log, entry = tmp_path / "log", "tests.faults.faulty_trainings:interpreter_stuck"
    assert launcher.train([str(tmp_path)], 1, log, entry) == [1]
    assert "Timeout" in log.read_text()
    assert "in interpreter_stuck" in log.read_text()


def test_waiting_for_data_is_a_phase(
    toy_tokens: Path, tmp_path: Path, train_here: Callable[[list[str]], Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a hang of the storage would be called; the step goes on where it was."""
    entered: list[tuple[int, str]] = [(0, "start")]

    class Noted(Watchdog):
        def enter(self, phase: str, step: int | None = None) -> None:
            super().enter(phase, step)
            entered.append((entered[-1][0] if step is None else step, phase))

    monkeypatch.setattr("megaphi.training.trainer.Watchdog", Noted)
    train_here(toy_options(toy_tokens, tmp_path / "run", train__steps=2))
    place = entered.index((2, "data"))
    phases = ["forward_backward", "data", "forward_backward"]
    assert entered[place - 1 : place + 2] == [(2, phase) for phase in phases]
