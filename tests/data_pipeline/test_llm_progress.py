"""The progress line says what happens, to logs as well as to terminals."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from data_pipeline.llm import session
from data_pipeline.llm.ask import Traffic
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.session import LOG_SECONDS, Progress
from tests.data_pipeline.llm_server import Asked, Reply, ScriptedServer
from tests.data_pipeline.test_llm_generate import generate, good, make
from tools.cli import main

LINE = re.compile(
    r"generate (\d+)/(\d+) \| accepted (\d+) \(([\d.]+)/min\) \| (\d+) tok/s \| 429 ([\d.]+)% \| "
    r"\$([\d.]+) \| eta (?:(\d+)h(\d\d)m|n/a)"
)


def test_figures_of_a_known_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes at 60 requests a minute, after 200 answers that were in the ledger."""
    monkeypatch.setattr(time, "monotonic", lambda: 1300.0)
    traffic = Traffic(started=1000.0, sent=400, answered=300, reused=200, completion_tokens=36_000)
    traffic.failures["http_429"] = 100
    progress = Progress("generate", total=1400, done=500, accepted=400)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.spent = 1_234_500_000
    found = LINE.fullmatch(progress.line(traffic, ledger))
    ledger.close()
    assert found is not None
    done, total, accepted, rate, tokens, throttled, spent, hours, minutes = found.groups()
    assert (done, total, accepted) == ("500", "1400", "400")
    assert float(rate) == 48.0, "60 a minute, of which 4 of 5 are accepted; not those of the ledger"
    assert float(tokens) == 120
    assert float(throttled) == 25.0
    assert spent == "1.2345"
    assert (hours, minutes) == ("0", "15"), "900 are left"


def test_nothing_is_divided_by_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    line = Progress("generate", total=10).line(Traffic(), ledger)
    assert line.endswith("429 0.0% | $0.0000 | eta n/a")
    note = Progress("annotate m", total=10, note="batches: in_progress 3/9").line(Traffic(), ledger)
    assert note.endswith("| batches: in_progress 3/9")
    ledger.close()


def test_a_log_gets_whole_lines_that_agree_with_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert LOG_SECONDS == 30
    monkeypatch.setattr(session, "LOG_SECONDS", 0.1)
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 40)

    def script(asked: Asked, before: int) -> Reply:
        if before == 0 and len(server.times) % 4 == 0:
            return Reply({"error": "slow down"}, 429, {"Retry-After": "0"})
        return good(asked, before)

    capfd.readouterr()
    with ScriptedServer(script) as server:
        more = ("--requests-per-minute", "3000", "--in-flight", "2")
        assert main(generate(plan, server.url, out, *more)) == 0
    said = capfd.readouterr().err
    assert "\r" not in said
    assert "\x1b" not in said
    lines: list[Any] = [LINE.fullmatch(line) for line in said.splitlines()[1:]]
    assert len(lines) > 3
    assert all(lines)
    done = [int(line[1]) for line in lines]
    assert done == sorted(done)
    assert done[-1] == 40
    last, traffic = lines[-1], json.loads((out / "report.json").read_text())["traffic"]
    assert float(last[7]) == pytest.approx(traffic["ledger_dollars"])
    share = traffic["failures"]["http_429"] / traffic["requests_sent"]
    assert float(last[6]) == pytest.approx(100 * share, abs=0.06)
    # The report is made a moment later than the last line.
    seconds = 40 * 60 / float(last[4])
    assert seconds <= traffic["seconds"] * 1.01
    assert float(last[5]) == pytest.approx(400 / seconds, rel=0.05, abs=1)
