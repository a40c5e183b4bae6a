"""The long run's own bookkeeping: what it counts, what it prints, how it ends."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from tests.faults import soak
from tests.faults.save_trials import Outcome


def run(monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome | None], report: Path) -> int:
    """The command with these outcomes in place of real trials."""
    trials = [soak.Trial(f"training disturbed, {o and 'a'}", lambda *_, o=o: o) for o in outcomes]
    monkeypatch.setattr(soak, "trials", lambda: iter(trials))
    monkeypatch.setattr(soak, "Launcher", contextlib.nullcontext)
    monkeypatch.setattr(sys, "argv", ["soak", "1", "7", "--json", str(report)])
    return soak.main()


def test_a_violation_is_printed_with_its_seed_and_trial_and_ends_in_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    good = Outcome(1, {"kill one": 2, "terminate": 1})
    bad = Outcome(1, {"kill one": 1, "swapped": 1}, ["another end"])
    assert run(monkeypatch, [good, None, bad], report) == 1
    printed = capsys.readouterr().out
    assert "VIOLATION (seed 7, trial 2): another end" in printed
    assert "not possible here" in printed
    written = json.loads(report.read_text())
    assert written["seed"] == 7
    assert written["summary"]["kills of a training"] == 3
    assert written["summary"]["damaged checkpoints under a training"] == 1
    assert written["summary"]["violations"] == 1
    (row,) = written["rows"].values()
    assert row["tried"] == 2


def test_without_a_violation_it_ends_in_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, [Outcome(5, {})], tmp_path / "report.json") == 0
    assert "0 violations" in capsys.readouterr().out
