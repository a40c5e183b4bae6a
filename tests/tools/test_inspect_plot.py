"""`megaphi inspect RUN --plot`: every curve and every interruption of a run is drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import toy_options
from tools.cli import main
from tools.inspect.plot import read_curves

pytest.importorskip("matplotlib")


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    run_dir.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')  # torn by a kill


def test_what_is_drawn(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 9.0 / step, "grad_norm": 1.0, "lr": 0.1} for step in range(1, 8)
    ]
    rows[3] |= {"loss": None, "grad_norm": None}
    rows.insert(3, {"step": 3, "event": "resume", "host": "a"})
    rows.insert(6, {"step": 5, "event": "rewind"})
    rows.insert(7, {"step": 5, "event": "resume"})
    rows.append({"step": 7, "validation_loss": 4.5})
    write_metrics(tmp_path / "run", rows)
    curves = read_curves(tmp_path / "run")
    assert curves.of("loss") == ([1, 2, 3, 5, 6, 7], [9.0 / s for s in (1, 2, 3, 5, 6, 7)])
    assert curves.of("lr")[0] == [1, 2, 3, 4, 5, 6, 7]
    assert curves.of("tokens_per_second_per_gpu") == ([], [])
    assert curves.validation == [(7, 4.5)]
    assert curves.events == {"resume": [3, 5], "rewind": [5], "skipped": [4]}


def test_a_real_run(
    tmp_path: Path, toy_tokens: Path, train_here: Callable[[list[str]], Any], capsys
) -> None:
    run_dir = tmp_path / "run"
    train_here(toy_options(toy_tokens, run_dir, train__steps=4, checkpoint__interval=2))
    capsys.readouterr()
    picture = tmp_path / "run.png"
    assert main(["inspect", str(run_dir), "--plot", str(picture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(run_dir), "--plot", str(tmp_path / "run.docx")]) == 2
    assert "docx" in capsys.readouterr().err


def test_nothing_to_plot(tmp_path: Path, toy_tokens: Path, capsys) -> None:
    write_metrics(tmp_path / "run", [])
    assert main(["inspect", str(tmp_path / "run"), "--plot", str(tmp_path / "p.png")]) == 2
    assert "no step is in it yet" in capsys.readouterr().err
    assert main(["inspect", str(toy_tokens), "--plot", str(tmp_path / "p.png")]) == 2
    assert "--plot draws a run" in capsys.readouterr().err
