"""`megaphi data` as a user meets it: exit statuses, one-line errors, text and JSON results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaphi.data.indexed import IndexedDataset
from tools import cli


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    for number in range(40):
        text = f"def f_{number}(x):\n    return x + {number}\n" if number % 10 else ""
        (tmp_path / "tree" / f"{number:02d}.py").write_text(text)
    return tmp_path / "tree"


def call(*arguments: object) -> int:
    return cli.main(["data", *map(str, arguments)])


def test_from_files_to_a_merged_token_file(
    tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*arguments: object) -> dict[str, object]:
        assert call(*arguments, "--json") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        parsed: dict[str, object] = json.loads(lines[0])
        return parsed

    records = tmp_path / "records"
    ingested = result("ingest", tree, "--out", records, "--workers", 1)
    assert (ingested["records_in"], ingested["records_out"]) == (40, 36)
    assert ingested["rejected"] == {"empty": 4}
    assert result("ingest", tree, "--out", records)["reused"] is True
    trained = result("train-tokenizer", records, "--vocab-size", 330, "--out", tmp_path / "tok")
    assert trained["vocab_size"] == 330
    prefix = tmp_path / "tokens" / "train"
    made = result("tokenize", records, "--tokenizer", tmp_path / "tok", "--out", prefix)
    assert made["documents"] == len(IndexedDataset(prefix)) == 36
    assert made["tokens"] == IndexedDataset(prefix).num_tokens
    assert made["tokenizer_sha256"] == trained["tokenizer_sha256"]
    merged = result("merge", prefix, prefix, "--out", tmp_path / "merged")
    assert (merged["documents"], merged["tokens"]) == (72, 2 * IndexedDataset(prefix).num_tokens)


def test_text_results_are_one_line_each(
    tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, prefix = tmp_path / "records", tmp_path / "train"
    assert call("ingest", tree, "--out", records) == 0
    assert call("ingest", tree, "--out", records) == 0
    assert call("tokenize", records, "--tokenizer", "codegen", "--out", prefix) == 0
    assert call("merge", prefix, "--out", tmp_path / "merged") == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first.startswith(f"ingested {records}: 36 records")
    assert "4 rejected (empty 4) of 40 | " in first
    assert second.startswith(f"reused {records}: 36 records")
    assert third.startswith(f"tokenized {prefix}: 36 documents")
    assert "gigatoken" in third
    assert fourth.startswith(f"merged {tmp_path / 'merged'}: 36 documents")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: VERB"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["ingest"], "required: SOURCE, --out"),
        (["ingest", "TREE", "--out", "OUT", "--bogus"], "unrecognized arguments: --bogus"),
        (["ingest", "TREE", "--out", "OUT", "--max-bytes", "many"], "invalid int value: 'many'"),
        (["ingest", "TREE", "--out", "OUT", "--workers", "0"], "--workers 0"),
        (["ingest", "TREE", "--out", "OUT", "--max-reject", "2"], "--max-reject 2.0"),
        (["ingest", "TREE", "--out", "OUT", "--limit", "0"], "--limit 0"),
        (["ingest", "TREE", "--out", "OUT", "--min-bytes", "9", "--max-bytes", "8"], "--min-bytes"),
        (["ingest", "TREE/absent", "--out", "OUT"], "no such file"),
        (["tokenize", "TREE", "--tokenizer", "codegen", "--out", "OUT"], "no manifest.json"),
        (["train-tokenizer", "TREE", "--vocab-size", "5", "--out", "OUT"], "--vocab-size 5"),
        (["merge", "TREE/absent", "--out", "OUT"], "no such token file"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(
    tmp_path: Path,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = str(tmp_path / "out")
    filled = [a.replace("TREE", str(tree)).replace("OUT", out) for a in arguments]
    assert call(*filled) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert not list(tmp_path.glob("out*"))


def test_broken_data_are_status_1_and_too_many_rejects_3(
    tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("ingest", tree, "--out", tmp_path / "out", "--max-reject", "0.05") == 3
    assert "4 of 40 documents were rejected (empty 4)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call("ingest", tree, "--out", tmp_path / "out") == 0
    part = tmp_path / "out" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    tokenize = ["tokenize", tmp_path / "out", "--tokenizer", "codegen", "--out", tmp_path / "t"]
    assert call(*tokenize) == 1
    assert "part-00000.jsonl: missing or not" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.py").write_text("")
    assert call("ingest", tmp_path / "one", "--out", tmp_path / "none", "--max-reject", "1") == 1


@pytest.mark.parametrize("verb", ["", "ingest", "train-tokenizer", "tokenize", "merge"])
def test_help_is_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(*([verb] if verb else []), "--help")
    assert left.value.code == 0
    assert "usage: megaphi data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["ingest", "nobody/nothing", "--out", "OUT"],
        ["tokenize", "RECORDS", "--tokenizer", "nobody/nothing", "--out", "OUT"],
    ],
)
def test_the_hub_out_of_reach_is_one_line(tmp_path: Path, tree: Path, arguments: list[str]) -> None:
    assert call("ingest", tree, "--out", tmp_path / "records") == 0
    filled = [
        argument.replace("RECORDS", str(tmp_path / "records")).replace("OUT", str(tmp_path / "x"))
        for argument in arguments
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "megaphi", "data", *filled],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "nobody/nothing: no such path here" in ran.stderr


def test_no_verb_loads_torch(tmp_path: Path, tree: Path) -> None:
    code = (
        "import sys, tools.cli\n"
        "assert tools.cli.main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    base = [sys.executable, "-c", code, "data"]
    records, prefix = str(tmp_path / "records"), str(tmp_path / "t")
    for arguments in (
        ["ingest", str(tree), "--out", records],
        ["train-tokenizer", records, "--vocab-size", "300", "--out", str(tmp_path / "tok")],
        ["tokenize", records, "--tokenizer", str(tmp_path / "tok"), "--out", prefix],
        ["merge", prefix, "--out", str(tmp_path / "m")],
    ):
        ran = subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
