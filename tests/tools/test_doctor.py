"""The doctor names what is there and what is not, and never fails for a missing part."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from tools.cli import main
from tools.doctor import package_state


def test_report_as_json_agrees_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["packages"]["tokenizers"] == importlib.metadata.version("tokenizers")
    assert len(report["devices"]) == torch.cuda.device_count()
    expected = "GPU" if torch.cuda.is_available() else "CPU"
    assert expected in report["runs"]["device"]


def test_report_as_text_has_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "flash-attn", "apex", "precision.dtype=auto", "attention", "operations"):
        assert word in text


def test_missing_and_broken_packages_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert package_state("no_such_module_anywhere", "nothing") == "not installed"
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = package_state("amp_C", "apex")
    assert "does not import: undefined symbol" in state
