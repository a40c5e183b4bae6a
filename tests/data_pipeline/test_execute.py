"""`megaphi data execute`: exercises of every kind, in the sandbox."""

import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.generation.execute import Ran, plan_execute, program
from data_pipeline.runner.stage import Options, Stage, Tally, Work, run_stage
from tests.data_pipeline.record_files import read
from tests.isolation import needs_sandbox
from tools.cli import main

DOUBLE = (
    'def double(x):\n    """Double x.\n\n    >>> double(2)\n    {}\n    """\n    return 2 * x\n'
)
EXERCISES = {
    "sound": (DOUBLE.format(4), ""),
    "future": ("from __future__ import annotations\n" + DOUBLE.format(4), ""),
    "asserts": ("def one():\n    return 1\n\n\nassert one() == 1\n", ""),
    "main": ("def one():\n    return 1\n\n\nif __name__ == '__main__':\n    one(2)\n", ""),
    "traceback": (
        'def bad():\n    """Fail.\n\n    >>> bad()\n    Traceback (most recent call last):\n'
        '    ValueError: no\n    """\n    raise ValueError("no")\n',
        "",
    ),
    "hash order": (
        'def kinds():\n    """All.\n\n    >>> sorted(kinds())\n    [\'a\', \'b\']\n    """\n'
        "    return {'b', 'a'}\n",
        "",
    ),
    "wrong example": (DOUBLE.format(5), "doctest"),
    "false assert": ("def one():\n    return 2\n\n\nassert one() == 1\n", "exception"),
    "no such module": ("import not_a_module\n\n\ndef f():\n    return 1\n", "exception"),
    "no syntax": ("def f(:\n", "exception"),
    "input": ("name = input()\n", "exception"),
    "exit": ("import sys\nsys.exit(0)\n", "exception"),
    "loop": ("while True:\n    pass\n", "timeout"),
    "loop in an example": (
        'def f():\n    """Wait.\n\n    >>> f()\n    """\n    while True:\n        pass\n',
        "timeout",
    ),
    "crash": ("import ctypes\nctypes.string_at(0)\n", "died"),
    "quick exit": ("import os\nos._exit(0)\n", "died"),
    "memory": ("x = bytearray(10**10)\n", "exception"),
}


def keep(shard: Any, config: Any, tally: Tally) -> Iterator[Any]:
    for row in shard:
        tally.records_in += 1
        yield row


def write_records(root: Path, files: list[list[dict[str, Any]]]) -> Path:
    """A records directory with a part for each list of records."""
    stage = Stage(name="made", version="1", config={}, function=keep)
    work = Work(shards=files, fingerprint=[], describe=lambda seen: [], identify=list)
    run_stage(stage, work, root, Options())
    return root


def exercises(root: Path) -> Path:
    rows = [
        {"id": f"{number:032x}", "text": text, "source": "exercise", "name": name}
        for number, (name, (text, _)) in enumerate(EXERCISES.items())
    ]
    prose = {"id": "f" * 32, "text": "while True: pass\n", "source": "textbook"}
    return write_records(root / "records", [[*rows[:9], prose], rows[9:]])


def execute(records: Path, out: Path, *more: str) -> list[str]:
    arguments = ["data", "execute", str(records), "--out", str(out), "--json", "--timeout", "1"]
    return [*arguments, *more]


@needs_sandbox
def test_exercises_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = exercises(tmp_path)
    out = tmp_path / "out"
    assert main(execute(records, out, "--workers", "1")) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {name: reason for name, (_, reason) in EXERCISES.items()}
    rejects = [
        json.loads(line)
        for path in sorted(out.glob("rejected-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    names = list(EXERCISES)
    found = {names[int(row["id"], 16)]: row["reason"] for row in rejects}
    assert found == {name: reason for name, reason in expected.items() if reason}
    kept: list[Any] = read(out)
    assert [record.get("name") for record in kept] == [
        *[name for name in names[:9] if not expected[name]], None,
        *[name for name in names[9:] if not expected[name]],
    ]  # fmt: skip
    assert kept[0]["execution"] == {"status": "passed", "doctest": True}
    assert "execution" not in next(record for record in kept if record["source"] == "textbook")
    assert said["rejected"] == dict(Counter(filter(None, expected.values())))
    wrong = next(row for row in rejects if row["reason"] == "doctest")
    assert "Expected:" in wrong["detail"]
    assert "Got:" in wrong["detail"]


@needs_sandbox
def test_the_number_of_workers_is_not_seen(tmp_path: Path) -> None:
    texts = [DOUBLE.format(4), DOUBLE.format(5), "assert False\n", "x = 1\n"]
    rows = [
        {"id": f"{number:032x}", "text": text, "source": "exercise"}
        for number, text in enumerate(texts)
    ]
    records = write_records(tmp_path / "records", [rows[:2], rows[2:]])
    for workers in ("1", "2"):
        assert main(execute(records, tmp_path / workers, "--workers", workers)) == 0
    files = ["part-00000.jsonl", "part-00001.jsonl", "rejected-00000.jsonl", "rejected-00001.jsonl"]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert len(read(tmp_path / "1")) == len(read(tmp_path / "1", "rejected")) == 2


@needs_sandbox
def test_exercises_cannot_reach_the_host(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        target = tmp_path / "written"
        texts = [
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n",
            f"open({str(target)!r}, 'w').write('x')\n",
            f"assert open({str(tmp_path / 'secret')!r}).read()\n",
            "def f():\n    return 1\n",
        ]
        (tmp_path / "secret").write_text("secret")
        rows = [
            {"id": f"{n:032x}", "text": text, "source": "exercise"} for n, text in enumerate(texts)
        ]
        records = write_records(tmp_path / "records", [rows])
        assert main(execute(records, tmp_path / "out")) == 0
        with pytest.raises(TimeoutError):
            listener.accept()
    assert len(read(tmp_path / "out")) == 1
    assert not target.exists()


def test_refuses_without_isolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "0" * 32, "text": DOUBLE.format(4), "source": "exercise"}
    records = write_records(tmp_path / "records", [[row]])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(execute(records, tmp_path / "out")) == 2
    assert "bwrap not found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(execute(records, tmp_path / "out", "--unsafe-no-sandbox")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["isolation"].startswith("NONE: unsafe_no_sandbox")
    ran = [record for record in read(tmp_path / "out") if "execution" in record]
    assert result["exercises"] == len(ran) + len(read(tmp_path / "out", "rejected"))
    assert len(read(tmp_path / "out")) == 1


def test_the_order_of_the_verdicts_is_that_of_the_records(tmp_path: Path) -> None:
    rows = [
        {"id": f"{n:032x}", "text": f"x = {n}\n", "source": "exercise" if n % 3 else "textbook"}
        for n in range(1200)
    ]
    records = write_records(tmp_path / "records", [rows])
    asked: list[str] = []

    def run(programs: Any) -> list[Ran]:
        asked.extend(programs)
        return [Ran("passed" if hash(p) % 2 else "died", "") for p in programs]

    stage, work = plan_execute([records], run, {})
    manifest, _ = run_stage(stage, work, tmp_path / "out", Options(max_reject=1))
    assert asked == [program(row["text"]) for row in rows if row["source"] == "exercise"]
    wanted = [
        row["id"] for row in rows if row["source"] == "textbook" or hash(program(row["text"])) % 2
    ]
    assert [record["id"] for record in read(tmp_path / "out")] == wanted
    assert manifest.records_in == 1200
