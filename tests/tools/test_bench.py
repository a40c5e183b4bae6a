"""`megaphi bench data` from end to end at a tiny size; no time is asserted."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import tools.bench.command
import tools.bench.data.command
import tools.bench.machine
from tools.bench.data.rows import MEGATRON_LM, Group, Tool
from tools.bench.machine import package_version
from tools.cli import main

SMALL = ["--megabytes=0.05", "--index-tokens=50000", "--blend-samples=9000", "--loader-samples=20"]
GROUPS = [
    "near-dedup command",
    "decontaminate command",
    "syntax tree match",
    "tokenize command",
    "tokenize",
    "sample order",
    "blend order",
    "loader",
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A call with a source and a tokenizer of its own."""
    source = tmp_path / "source"
    for number in range(40):
        path = source / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        # long enough a function for a benchmark's solutions to be compared with
        body = "    for a in x:\n        if a > {k} and a * 2 < 9:\n            return [a + {k}]\n"
        path.write_text("".join(f"def f{number}_{k}(x):\n{body.format(k=k)}" for k in range(25)))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"], 280, show_progress=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    out = ["--out", str(tmp_path / "out"), "--source", str(source), "--workers", "1"]
    return ["bench", "data", *out, "--tokenizer", str(tmp_path / "tokenizer"), *SMALL]


def check_rows(report: dict[str, Any], groups: list[str]) -> None:
    """Every row has rates that follow from its own seconds, and ratios from the rates."""
    scales = {"MB/s": 1e6, "M pairs/s": 1e6, "M tokens/s": 1e6, "M samples/s": 1e6, "samples/s": 1}
    assert [group["name"] for group in report["groups"]] == groups
    for group in report["groups"]:
        ours = group["rows"][0]
        assert "problem" not in ours
        for row in group["rows"]:
            if "problem" in row:
                assert "rate" not in row
                continue
            assert len(row["seconds"]) == report["settings"]["repeats"]
            rates = sorted(row["amount"] / s / scales[group["unit"]] for s in row["seconds"])
            assert rates[0] == pytest.approx(row["lowest_rate"])
            assert rates[-1] == pytest.approx(row["highest_rate"])
            assert 0 < row["lowest_rate"] <= row["rate"] <= row["highest_rate"]
            assert row["rate_per_cpu_second"] > 0
            assert row["amount"] == ours["amount"] or group["name"] == "loader"
            if row is not ours:
                assert row["same_result"] is True
                assert row["megaphi_ratio"] * row["rate"] == pytest.approx(ours["rate"])


@pytest.mark.slow
def test_every_group(tmp_path: Path, words: list[str], capsys) -> None:
    """With the packages that there are; the results of all of them are equal."""
    assert main([*words, "--repeats", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "data.json").read_text())
    check_rows(report, GROUPS)
    rows = {row["name"]: row for group in report["groups"] for row in group["rows"]}
    for row in rows.values():
        if row["package"] == MEGATRON_LM:
            assert row["problem"] == "--megatron-lm is not given"
        else:
            installed = row["package"] is None or package_version(row["package"]) is not None
            assert row.get("problem") == (None if installed else "not installed")
    files = sorted((tmp_path / "source").rglob("*.py"))
    assert 0 < report["corpus"]["documents"] < len(files)
    assert 50_000 <= report["corpus"]["text_bytes"] < 50_000 + files[0].stat().st_size * 1.2
    assert (
        rows["megaphi: records -> .bin, .idx on disk"]["amount"] == (report["corpus"]["text_bytes"])
    )


def test_a_group_without_its_peers(tmp_path: Path, words: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(tools.bench.data.command, "package_version", lambda name: None)
    assert main([*words, "--repeats", "1", "--json", "--groups", "blend order"]) == 0
    report = json.loads(capsys.readouterr().out)
    check_rows(report, ["tokenize", "blend order"])
    rows = [row for group in report["groups"] for row in group["rows"]]
    assert [row.get("problem") for row in rows if row["package"]] == ["not installed"] * 3
    assert report["machine"]["command"].startswith("megaphi bench data --out ")
    text = (tmp_path / "out" / "data.txt").read_text()
    assert text.count("not installed") >= 3
    assert all(row["name"] in text for row in rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.json", "data.txt"]


def test_a_peer_that_fails_does_not_stop_the_others(
    tmp_path: Path, words: list[str], monkeypatch, capsys
) -> None:
    ours = Tool("ours", "blend_megaphi", ours=True)
    broken = Tool("broken", "no_such_measure", "numpy")
    tokens = Tool("tokens", "tokenize_megaphi", ours=True)  # the report describes them
    groups = (
        Group("tokenize", "MB/s", 1e6, (tokens,)),
        Group("g", "samples/s", 1.0, (ours, broken)),
    )
    monkeypatch.setattr(tools.bench.data.command, "GROUPS", groups)
    assert main([*words, "--json", "--repeats", "2"]) == 0
    first, second = json.loads(capsys.readouterr().out)["groups"][1]["rows"]
    assert first["amount"] == 9000
    assert "no_such_measure" in second["problem"]
    broken_group = Group("g", "samples/s", 1.0, (Tool("o", "none", ours=True),))
    monkeypatch.setattr(tools.bench.data.command, "GROUPS", (broken_group,))
    shutil.rmtree(tmp_path / "out")
    assert main(words) == 1  # ours must not fail
    assert "KeyError: 'none'" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_calls(tmp_path: Path, words: list[str], capsys) -> None:
    for option, value in (("--megabytes", "0"), ("--repeats", "0"), ("--loader-samples", "7")):
        assert main([*words, option, value]) == 2
        assert option in capsys.readouterr().err
    assert main([*words, "--blend-samples", "inf"]) == 2
    assert main([*words, "--groups", "tokenise"]) == 2
    assert "--groups tokenise: there are 'near-dedup" in capsys.readouterr().err
    assert main([*words, "--source", str(tmp_path / "nothing")]) == 2
    assert "nothing: no such directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*words, "--source", str(tmp_path / "empty")]) == 2
    assert "holds no .py files" in capsys.readouterr().err


def test_the_commit_is_that_of_the_checkout_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert tools.bench.machine.git_commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert tools.bench.machine.git_commit(tmp_path) == commit
    assert tools.bench.machine.git_commit(tmp_path / "inside") is None
    (tmp_path / "file").write_text("2")
    assert tools.bench.machine.git_commit(tmp_path) == f"{commit}-dirty"
