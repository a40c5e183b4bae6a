"""`megaphi data blend`: weights, budgets, and files that are not its own."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megaphi.data.indexed import IndexedDatasetWriter
from megaphi.recipe_file import load_recipe
from tools.cli import main

ROOT = Path(__file__).parents[2]


def write_tokens(prefix: Path, documents: int, length: int) -> Path:
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for number in range(documents):
            writer.add_document(np.full(length, number, np.uint16))
    return prefix


def blend(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", "blend", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_weights_are_the_shares_of_the_tokens_that_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_tokens(tmp_path / "a", 100, 10)  # 1,000 tokens
    b = write_tokens(tmp_path / "b", 50, 60)  # 3,000 tokens
    out = tmp_path / "blend.yaml"
    found = blend(capsys, f"{a}=3", b, "--out", out)
    assert [s["weight"] for s in found["sources"]] == [0.5, 0.5]
    assert found["tokens"] == 6000
    assert yaml.safe_load(out.read_text()) == {"data": {"train": [0.5, str(a), 0.5, str(b)]}}
    # a budget scales the epochs, not the weights
    found = blend(capsys, f"{a}=3", b, "--tokens", 12000, "--out", out, "--overwrite")
    assert [s["epochs"] for s in found["sources"]] == [6.0, 2.0]
    assert [s["weight"] for s in found["sources"]] == [0.5, 0.5]


def test_a_share_to_validate_on_is_whole_documents_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_tokens(tmp_path / "a", 100, 10), write_tokens(tmp_path / "b", 50, 60)
    out = tmp_path / "blend.yaml"
    found = blend(capsys, a, b, "--validation-share", 0.1, "--out", out)
    assert [s["tokens"] for s in found["sources"]] == [900, 2700]
    # the trainer takes the file's values, and the printed options, for the same
    recipe = ROOT / "launch" / "recipes" / "quickstart.yaml"
    data = load_recipe([str(recipe), *shlex.split(found["options"])]).data
    written = yaml.safe_load(out.read_text())["data"]
    assert data.train == written["train"] == [0.25, str(a), 0.75, str(b)]
    assert data.split == written["split"] == "90,10,0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x"], "must be PREFIX=EPOCHS"),
        (["a=0"], "epochs must be above 0"),
        (["a", "--tokens", "1e12"], "--tokens 1e+12: is 4e+10 passes over the 25 tokens"),
        (["a", "--tokens", "inf"], "passes"),
        (["a", "--tokens", "0"], "--tokens 0"),
        (["a", "--validation-share", "1"], "must be between 0 and 1"),
        (["gone"], "gone"),
    ],
)
def test_blends_that_cannot_be(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "a", 5, 5)
    assert main(["data", "blend", *words, "--out", "b.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.yaml").exists()


def test_a_file_of_another_making_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe written by hand, or a plan that was edited, must outlive a slip of --out."""
    tokens, out = write_tokens(tmp_path / "a", 5, 5), tmp_path / "mine"
    plan = ["plan-generation", "--kind", "exercises", "--samples", "3"]
    for words in (["blend", str(tokens)], plan):
        words = ["data", *words, "--out", str(out), "--json"]
        out.write_text("edited by hand")
        assert main(words) == 2
        assert "is another file than this" in capsys.readouterr().err
        assert out.read_text() == "edited by hand"
        assert main([*words, "--overwrite"]) == 0
        made = out.read_bytes()
        assert json.loads(capsys.readouterr().out)["reused"] is False
        assert main(words) == 0, "the same again"
        assert json.loads(capsys.readouterr().out)["reused"] is True
        assert out.read_bytes() == made
        out.unlink()
        out.mkdir()
        assert main(words) == 2
        assert "is a directory" in capsys.readouterr().err
        out.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
