"""What `megaphi data` must not do to its user: lose an input, count twice, or keep silent."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.dedup import stage as dedup_stage
from tests.data_pipeline.record_files import read, write_records
from tools import cli
from tools.data import progress as data_progress
from tools.data.parser import STAGES, make_parser


def call(*arguments: object) -> int:
    return cli.main(["data", *map(str, arguments)])


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def some_records(root: Path, count: int = 6) -> Path:
    """Records of which every second is rejected by `--near`: its text is that of the one before."""
    return write_records(root, [[{"text": f"value = {n // 2}\n" * 30} for n in range(count)]])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- inputs -------------------------------------------------------------------------------------


def test_overwriting_never_removes_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = some_records(tmp_path)
    inner = records / "inner"
    assert call("dedup", records, "--out", inner) == 0
    before = bytes_of(records)
    for source, out in ((records, records), (inner, records), (records, tmp_path / "link")):
        if out.name == "link":
            out.symlink_to(records)
        assert call("dedup", source, "--out", out, "--overwrite") == 2
        assert bytes_of(records) == before
    assert f"{records}: is read, and --overwrite of" in capsys.readouterr().err
    assert call("ingest", records, "--out", records, "--overwrite") == 2
    # a token file lies beside the folder of its name
    tokenize = ("tokenize", records, "--tokenizer", "codegen", "--out", records)
    assert call(*tokenize) == call(*tokenize, "--overwrite") == 0
    assert bytes_of(records) == before


def test_a_folder_of_data_never_holds_the_output_made_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run would read the records of the first, and count every document twice."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "rows.jsonl").write_text('{"text": "x = 1"}\n{"text": "y = 2"}\n')
    assert call("ingest", raw, "--out", raw / "deep" / "records") == 2
    assert "choose an --out elsewhere" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(raw)
    assert call("ingest", tmp_path / "link", "--out", raw / "records") == 2
    # of a folder of sources the records are not read
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("x = 1\n")
    for more in ((), ("--overwrite",)):
        assert result(capsys, "ingest", code, "--out", code / "out", *more)["records_out"] == 1


def test_data_files_beside_python_files_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loading script among the files of a data set must not pass for the data set."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "loader.py").write_text("x = 1\n")
    for number in range(3):
        (tmp_path / "set" / "data" / f"{number}.jsonl").write_text('{"text": "y"}\n')
    (tmp_path / "set" / "notes.txt").write_text("no kind of file that is read")
    out = tmp_path / "out"
    assert call("ingest", tmp_path / "set", "--out", out) == 3
    assert "3 of 4 documents were rejected (data_file 3)" in capsys.readouterr().err
    found = result(capsys, "ingest", tmp_path / "set", "--out", out, "--exclude", "*.jsonl")
    assert (found["records_in"], found["rejected"]) == (1, {})
    data = result(capsys, "ingest", tmp_path / "set" / "data", "--out", tmp_path / "data")
    assert data["records_out"] == 3


# ---- options ------------------------------------------------------------------------------------


def test_compression_is_not_forgotten_because_the_output_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, out = some_records(tmp_path), tmp_path / "out"
    plain = result(capsys, "dedup", records, "--out", out)
    assert call("dedup", records, "--out", out, "--zstd") == 2
    zstd = result(capsys, "dedup", records, "--out", out, "--zstd", "--overwrite")
    assert [path.name for path in out.glob("part-*")] == ["part-00000.jsonl.zst"]
    assert zstd["records_out"] == plain["records_out"]
    assert result(capsys, "dedup", records, "--out", out, "--zstd")["reused"] is True
    assert call("dedup", records, "--out", out) == 2


def test_what_was_set_aside_is_taken_when_more_rejects_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work are not done again, and only the same inputs and options count."""
    records, out = some_records(tmp_path), tmp_path / "out"
    dedup = ("dedup", records, "--out", out, "--max-reject")
    assert call(*dedup, 0.1) == call(*dedup, 0.2) == 3
    assert "higher --max-reject" in capsys.readouterr().err
    aside = bytes_of(tmp_path / "out.rejected")
    assert result(capsys, *dedup, 0.6, "--exact-only")["reused"] is False
    assert (tmp_path / "out.rejected").is_dir()
    call(*dedup, 0.6, "--overwrite")
    assert bytes_of(out)["part-00000.jsonl"] == aside["part-00000.jsonl"]
    fresh = bytes_of(out)
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    taken = result(capsys, *dedup, 0.6)
    assert taken["reused"] is True
    assert not (tmp_path / "out.rejected").exists()
    assert bytes_of(out) == aside
    assert {name for name in fresh if fresh[name] != aside[name]} == {"manifest.json"}
    # cleared away in part, it is made again
    assert call(*dedup, 0.1, "--overwrite") == 3
    (tmp_path / "out.rejected" / "part-00000.jsonl").unlink()
    for path in out.iterdir():
        path.unlink()
    assert result(capsys, *dedup, 0.6)["reused"] is False
    assert len(read(out)) == 3


def test_help_says_only_defaults_that_are_values() -> None:
    helps = {
        name: " ".join(make_parser(name, verb, with_help=True).format_help().split())
        for name, verb in STAGES.items()
    }
    for name, text in helps.items():
        for nothing in ("(default: None)", "(default: False)", "(default: [])", "(default: )"):
            assert nothing not in text, name
    assert "(default: 0.85)" in helps["dedup"]


# ---- what is said -------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, out = some_records(tmp_path), tmp_path / "out"

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dedup_stage, "dedup_run", full)
    assert call("dedup", records, "--out", out) == 1
    error = capsys.readouterr().err
    assert error == (
        f"megaphi: error: {out}: No space left on device; make room and run again, "
        "what is done is kept\n"
    )


def test_progress_reaches_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of many hours under nohup or Slurm must not look dead."""
    records = write_records(tmp_path, [[{"text": f"value = {n}\n" * 30}] for n in range(3)])
    quick = ("dedup", records, "--workers", 1, "--out")
    assert call(*quick, tmp_path / "a") == 0
    assert capsys.readouterr().err == "", "a short stage says nothing"
    monkeypatch.setattr(data_progress, "LOG_SECONDS", 0)
    assert call(*quick, tmp_path / "b") == 0
    lines = capsys.readouterr().err.splitlines()
    # both passes over the parts
    assert [line.split(" | ")[0] for line in lines] == [f"dedup {n}/3 parts" for n in (1, 2, 3)] * 2
    assert lines[2].endswith("eta 0h00m")


def test_trace_says_what_it_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "x = 1", "repo": "a/b"}, {"text": "y = 2"}, {"text": "z", "license": "MIT"}]
    records = write_records(tmp_path, [rows])
    capsys.readouterr()
    assert call("trace", records, "--repo", "c/d") == 0
    assert capsys.readouterr().out == (
        f"{records}: 0 of 3 documents; 2 of them name no repository\n"
    )
    assert call("trace", records, "--id", "0" * 32) == 0
    assert capsys.readouterr().out == f"{records}: 0 of 3 documents\n"
    assert result(capsys, "trace", records, "--license", "mit")["silent"] == 2


def test_a_missing_plan_or_template_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ("--model", "m", "--base-url", "http://127.0.0.1:1/v1", "--out", tmp_path / "out")
    assert call("generate", tmp_path / "gone.jsonl", *server) == 2
    assert "make one with `megaphi data plan-generation`" in capsys.readouterr().err
    plan = tmp_path / "plan.jsonl"
    samples = ("plan-generation", "--kind", "exercises", "--out", plan, "--samples")
    assert call(*samples, 0) == 2
    assert "--samples 0: at least 1" in capsys.readouterr().err
    assert call(*samples, 2) == 0
    assert call("generate", plan, *server, "--prompt", tmp_path / "gone") == 2
    assert f"--prompt {tmp_path / 'gone'}: no such file" in capsys.readouterr().err


def test_a_server_elsewhere_is_never_asked_without_a_cap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAPHI_API_KEY", "k" * 20)
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    assert call("plan-generation", "--kind", "exercises", "--samples", 2, "--out", plan) == 0
    generate = ("generate", plan, "--out", out, "--model", "m", "--yes", "--price-in", 1)
    server = ("--price-out", 1, "--base-url", "https://server.invalid/v1", "--attempts", 1)
    assert call(*generate, *server) == 2
    assert "server.invalid: is asked only with a --max-cost" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert call(*generate, *server, "--estimate") == 0
    # with a cap it is asked: it does not exist
    assert call(*generate, *server, "--max-cost", 1, "--max-wait", "0.01") == 1
    assert "not one request was answered" in capsys.readouterr().err
