"""Generation from plan to records: checks, gate, caps, kills; with a scripted server."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from data_pipeline.annotation.sample import read_records
from data_pipeline.generation.plan import Entry, default_lists, make_plan, permuted, read_plan
from tests.data_pipeline.llm_server import Asked, Reply, ScriptedServer, completion
from tests.helpers import child_environment
from tools.cli import main

NAME = re.compile(r"named `(\w+)`")


def exercise(name: str, salt: str = "") -> str:
    """A sound exercise, unlike that of any other name."""
    lines = "\n".join(f"    {name}_{step} = {step} * len('{name}{salt}')" for step in range(12))
    return (
        f'```python\ndef {name}(value: int) -> int:\n    """Add what {name} needs, {salt}.\n'
        f'\n    >>> {name}(1)\n    1\n    """\n{lines}\n    return value + {name}_3\n```'
    )


def good(asked: Asked, before: int) -> Reply:
    found = NAME.search(asked.prompt)
    assert found is not None
    return Reply(completion(exercise(found[1], asked.key[:8])))


def make(path: Path, samples: int, kind: str = "exercises") -> list[Entry]:
    arguments = ["data", "plan-generation", "--kind", kind, "--samples", str(samples)]
    assert main([*arguments, "--out", str(path)]) == 0
    return list(read_plan(path))


def generate(plan: Path, url: str, out: Path, *more: str) -> list[str]:
    """Arguments of a generation that costs $1 a thousand tokens."""
    return [
        *("data", "generate", str(plan), "--out", str(out), "--base-url", url, "--model", "m"),
        *("--price-in", "1000", "--price-out", "1000", "--max-tokens", "100", "--yes", "--json"),
        *("--max-wait", "0.05", "--max-reject", "1", *more),
    ]


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    text = out.with_name(out.name + ".ledger.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def stored(out: Path) -> list[str]:
    return [line["request"] for line in ledger_lines(out) if line["kind"] == "answer"]


def test_a_plan_is_stable_balanced_and_without_repeats(tmp_path: Path) -> None:
    entries = make(tmp_path / "plan.jsonl", 300)
    assert entries == make(tmp_path / "again.jsonl", 300)
    assert len({entry.id for entry in entries}) == 300
    assert len({tuple(sorted(entry.fields.items())) for entry in entries}) == 300
    topics = [entry.fields["topic"] for entry in entries]
    counts = {topics.count(topic) for topic in set(topics)}
    assert counts <= {300 // len(set(topics)), -(-300 // len(set(topics)))}
    # A longer plan goes on where a shorter one ends, so that nothing is paid for again.
    assert make(tmp_path / "longer.jsonl", 400)[:300] == entries
    other = list(make_plan("exercise", 300, default_lists("exercise"), seed=5))
    assert not {entry.id for entry in other} & {entry.id for entry in entries}


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_a_permutation_reaches_everything_once(size: int) -> None:
    assert sorted(permuted(index, size, "key") for index in range(size)) == list(range(size))
    if size == 1000:
        assert [permuted(index, size, "key") for index in range(9)] != list(range(9))


def test_a_plan_that_exhausts_its_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = tmp_path / "lists.yaml"
    lists.write_text(
        "topic: [a, b]\naudience: [c]\ndifficulty: [d, e, f]\nstyle: [g, h]\nwords: [i]\n"
    )
    arguments = ["data", "plan-generation", "--kind", "textbooks", "--lists", str(lists)]
    arguments.append("--overwrite")
    out = tmp_path / "plan.jsonl"
    assert main([*arguments, "--samples", "12", "--out", str(out)]) == 0
    entries = list(read_plan(out))
    assert len({tuple(entry.fields.values()) for entry in entries}) == 12
    assert main([*arguments, "--samples", "13", "--out", str(out)]) == 2
    assert "12 distinct combinations" in capsys.readouterr().err
    # the same combinations again, with every other choice of words once: C(5, 3) = 10 of them
    lists.write_text(
        "topic: [a, b]\naudience: [c]\ndifficulty: [d, e, f]\nstyle: [g, h]\n"
        "words: [i, j, k, l, m]\n"
    )
    assert main([*arguments, "--samples", "120", "--out", str(out)]) == 0
    entries = list(read_plan(out))
    found = {(e.fields["topic"], e.fields["difficulty"], e.fields["style"]) for e in entries[:12]}
    assert len(found) == 12
    drawn = {
        (*list(e.fields.values())[:4], *sorted(e.fields["words"].split(", "))) for e in entries
    }
    assert len(drawn) == 120
    assert main([*arguments, "--samples", "121", "--out", str(out)]) == 2
    assert "120 distinct combinations" in capsys.readouterr().err
    lists.write_text("nmae: [a]\n")
    assert main([*arguments, "--samples", "3", "--out", str(out)]) == 2
    assert "nmae: unknown" in capsys.readouterr().err


def test_exercises_become_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    entries = make(plan, 12)
    names = [entry.fields["name"] for entry in entries]
    bad = {
        names[1]: "Sorry, I can only write prose.",
        names[2]: "```python\ndef broken(:\n```",
        names[3]: f'```python\ndef {names[3]}(x):\n    """Do a lot of things."""\n    pass\n```',
        names[4]: exercise(names[4]).replace("```python", "<|im_start|>\n```python"),
        names[5]: exercise("something_else"),
        names[6]: f"```python\ndef {names[6]}(x):\n    return x\n```",
        names[7]: exercise(names[7]).replace("return", "# TODO: the rest\n    return"),
    }

    def script(asked: Asked, before: int) -> Reply:
        found = NAME.search(asked.prompt)
        assert found is not None
        if found[1] == names[8]:
            cut = completion(exercise(names[8]))
            cut["choices"][0]["finish_reason"] = "length"
            return Reply(cut)
        return Reply(completion(bad[found[1]])) if found[1] in bad else good(asked, before)

    with ScriptedServer(script) as server:
        assert main(generate(plan, server.url, out)) == 0
        asked = len(server.asked)
        capsys.readouterr()
        assert main(generate(plan, server.url, out)) == 0
        assert json.loads(capsys.readouterr().out)["reused"] is True
        assert main(generate(plan, server.url, out, "--overwrite")) == 0
        assert len(server.asked) == asked == 12, "the ledger answers"
    made: list[Any] = [record for _, record in read_records([out])]
    kept = {record["gen"]["entry"]: record for record in made}
    assert set(kept) == {entry.id for entry in (entries[0], *entries[9:])}
    for entry in (entries[0], *entries[9:]):
        record: Any = kept[entry.id]
        assert record["problem"] + record["solution"] == record["text"]
        function = ast.parse(record["text"]).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == entry.fields["name"]
        assert ast.get_docstring(function) is not None
        assert record["problem"].rstrip().endswith('"""')
        assert record["gen"]["plan"] == entry.fields
        assert record["gen"]["request"] in server.times
        assert record["lineage"][-1]["stage"] == "generate"
    with (out / "rejected-00000.jsonl").open() as stream:
        rejects = {line["id"]: line["reason"] for line in map(json.loads, stream)}
    assert [rejects[entry.id] for entry in entries[1:9]] == [
        "syntax", "no_code", "no_body", "control_token", "no_code", "no_docstring",
        "placeholder", "truncated",
    ]  # fmt: skip


def test_repeats_are_rejected_and_end_the_spending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 60)
    body = "\n".join(f"    step_{step} = value * {step}" for step in range(30))

    def script(asked: Asked, before: int) -> Reply:
        found = NAME.search(asked.prompt)
        assert found is not None
        if len(server.asked) <= 10:
            return good(asked, before)
        head = f'def {found[1]}(value):\n    """The same as ever."""'
        return Reply(completion(f"```python\n{head}\n{body}\n    return 1\n```"))

    with ScriptedServer(script) as server:
        more = ("--in-flight", "1", "--window", "10", "--stop-below", "0.3")
        assert main(generate(plan, server.url, out, *more)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["stopped"] == "nothing new any more"
    assert result["growth_curve"] == [
        {"asked": 10, "new": 10, "repeated": 0},
        {"asked": 10, "new": 1, "repeated": 9},
    ]
    assert len(server.asked) == 20, "40 samples are not paid for"
    assert manifest(out)["rejected"] == {"near_duplicate": 9}


def test_nothing_is_spent_without_consent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 10)
    with ScriptedServer(good) as server:
        arguments = generate(plan, server.url, out)
        arguments.remove("--yes")
        capsys.readouterr()
        assert main([*arguments, "--estimate"]) == 0
        estimate = json.loads(capsys.readouterr().out)
        assert main(arguments) == 2
        assert "pass --yes" in capsys.readouterr().err
        assert server.asked == []
        assert main([*arguments, "--estimate", "--tokenizer", "codegen"]) == 0
        exact = json.loads(capsys.readouterr().out)
        assert main([*arguments, "--yes"]) == 0
        spent = json.loads(capsys.readouterr().out)["dollars"]
    assert (estimate["samples"], estimate["completion_tokens"]) == (10, 1000)
    assert exact["prompt_tokens"] < estimate["prompt_tokens"]
    assert estimate["dollars"] == pytest.approx((estimate["prompt_tokens"] + 1000) / 1000)
    assert spent == pytest.approx(10 * 60 / 1000)
    assert spent < estimate["dollars"]


def test_the_cost_cap_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 40)
    with ScriptedServer(good) as server:
        arguments = generate(plan, server.url, out, "--max-cost", "2")
        assert main(arguments) == 1
        assert "raise --max-cost" in capsys.readouterr().err
        # An answer costs $0.06 and about $0.9 are set aside for it: the cap is used up to that.
        assert 15 <= len(server.asked) <= 33
        asked = len(server.asked)
        assert main(arguments) == 1
        assert len(server.asked) == asked
        assert main([*arguments, "--partial"]) == 0
        assert manifest(out)["records_out"] == asked
        assert main([*arguments, "--max-cost", "9", "--overwrite"]) == 0
        assert len(server.asked) == 40
    assert manifest(out)["records_out"] == 40
    assert max(server.times.values()) == 1


def test_killed_and_resumed_pays_for_nothing_twice(tmp_path: Path) -> None:
    """Kill -9 while answers stream in, several times; then the result is that of a quiet run."""
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 90)
    paid: set[str] = set()  # a server that knows the Idempotency-Key charges once for each
    kill_at = threading.Event()

    def script(asked: Asked, before: int) -> Reply:
        paid.add(asked.key)
        if len(server.asked) in (20, 45):
            kill_at.set()
        return good(asked, before)

    with ScriptedServer(script) as server:
        arguments = generate(plan, server.url, out, "--in-flight", "4", "--max-cost", "1000")
        command = [sys.executable, "-m", "megaphi", *arguments]
        killed = []
        for _ in range(2):
            kill_at.clear()
            process = subprocess.Popen(
                command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert kill_at.wait(60), process.communicate()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed.append(process.returncode)
            assert not out.exists()
        assert killed == [-signal.SIGKILL] * 2
        before = set(stored(out))
        again = len(server.asked)
        assert main(arguments) == 0
        assert not {asked.key for asked in server.asked[again:]} & before, "a stored answer is kept"
    answers = stored(out)
    assert len(answers) == len(set(answers)) == 90
    assert paid == set(answers)
    # Only what was under way when the process died is asked again: at most 4 each time.
    assert len(server.asked) <= 90 + 2 * 4
    lines = ledger_lines(out)
    lost = [line for line in lines if line["kind"] == "lost"]
    assert len(lost) <= 2 * 4
    assert all(line["reason"] == "killed" for line in lost)
    assert len({line["request"] for line in lost} - set(answers)) == 0
    quiet = tmp_path / "quiet"
    with ScriptedServer(good) as server:
        assert main(generate(plan, server.url, quiet)) == 0
    assert os.path.getsize(out / "part-00000.jsonl") > 10_000
    assert (out / "part-00000.jsonl").read_bytes() == (quiet / "part-00000.jsonl").read_bytes()


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 8)
    hanging, resumed = threading.Event(), threading.Event()

    def script(asked: Asked, before: int) -> Reply:
        if len(server.asked) > 4 and not resumed.is_set():
            hanging.set()
            return Reply(None, write=lambda stream: time.sleep(30))
        return good(asked, before)

    with ScriptedServer(script) as server:
        arguments = generate(plan, server.url, out, "--in-flight", "1", "--max-cost", "100")
        process = subprocess.Popen(
            [sys.executable, "-m", "megaphi", *arguments],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert hanging.wait(60), process.communicate()
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode()
        assert process.returncode == 130, error
        assert error.splitlines()[-1] == "megaphi: interrupted"
        assert len(stored(out)) == 4
        resumed.set()
        assert main(arguments) == 0
    assert len(stored(out)) == len(set(stored(out))) == 8
    assert sorted(server.times.values()) == [1] * 7 + [2], "only what hung is asked again"


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    with ScriptedServer(good) as server:
        url = server.url
    assert main(generate(plan, url, out, "--attempts", "2")) == 1
    assert "not one request was answered" in capsys.readouterr().err
    assert not out.exists()
    assert all(line["kind"] != "lost" for line in ledger_lines(out)), "nothing can be billed"
