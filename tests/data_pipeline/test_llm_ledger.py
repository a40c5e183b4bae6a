"""The ledger keeps every answer once and every dollar, whatever kills the process."""

import asyncio
import json
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.llm.batch_journal import Member
from data_pipeline.llm.ledger import Answer, CostCapReached, Ledger
from data_pipeline.llm.prices import Price, read_prices
from megaphi.errors import RunError


def answer(nano: int = 5, content: str = "x") -> Answer:
    return Answer(
        content=content,
        finish_reason="stop",
        problem=None,
        served_model="m",
        prompt_tokens=3,
        completion_tokens=2,
        nano=nano,
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def ask(ledger: Ledger, request: str, most: int, given: Answer) -> None:
    await ledger.reserve(request, most)
    await ledger.store(request, given)


def test_answers_survive_and_sums_add_up(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)

    async def work() -> None:
        await asyncio.gather(
            *(ask(ledger, f"r{number}", 10, answer(number, f"é{number}")) for number in range(50))
        )
        await ledger.reserve("refused", 10)
        await ledger.free("refused", "http_500")
        await ledger.reserve("silent", 10)
        await ledger.lose("silent", "timeout")

    run(work())
    assert ledger.spent == sum(range(50)) + 10
    assert ledger.reserved == 0
    ledger.close()
    again = Ledger(path)
    assert (again.spent, again.lost, len(again)) == (sum(range(50)) + 10, 1, 50)
    assert again.prompt_tokens == 150
    assert again.answer("r7") == answer(7, "é7")
    assert again.answer("refused") is None
    again.close()


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_half_written_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    run(ask(ledger, "a", 10, answer(4)))
    run(ask(ledger, "b", 10, answer(4)))
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Ledger(path)
    assert again.answer("a") == answer(4)
    assert again.answer("b") is None
    # b was reserved and may have been paid: the most that it can have cost counts.
    assert again.spent == 4 + 10
    run(ask(again, "b", 10, answer(4)))
    again.close()
    assert Ledger(path).spent == 4 + 10 + 4
    for line in path.read_text().splitlines():
        json.loads(line)


def test_damage_in_the_middle_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for name in "abc":
        run(ask(ledger, name, 10, answer()))
    ledger.close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"kind": "ans\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=f"byte {len(lines[0] + lines[1])}: not a line of a ledger"):
        Ledger(path)
    assert path.read_bytes() == b"".join(lines)


def test_the_cap_waits_for_what_is_under_way_then_stops(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", max_nano=25)

    async def work() -> int:
        await ledger.reserve("a", 20)
        second = asyncio.create_task(ledger.reserve("b", 20))
        await asyncio.sleep(0.01)
        assert not second.done(), "20 + 20 might exceed 25"
        await ledger.store("a", answer(5))
        await second
        await ledger.store("b", answer(20))
        with pytest.raises(CostCapReached):
            await ledger.reserve("c", 1)
        return ledger.spent

    assert run(work()) == 25
    ledger.close()


def test_reservations_of_a_killed_process_count_as_spent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):  # killed twice at the same request
        child = os.fork()
        if child == 0:
            ledger = Ledger(path, max_nano=100)
            run(ledger.reserve("a", 40))
            os.kill(os.getpid(), 9)
        os.waitpid(child, 0)
    ledger = Ledger(path, max_nano=100)
    assert (ledger.spent, ledger.lost) == (80, 2)
    with pytest.raises(CostCapReached):
        run(ledger.reserve("a", 40))
    ledger.close()


@pytest.mark.parametrize("step", ["planned", "creating", "created", "closed"])
def test_what_a_batch_may_cost_stays_reserved_over_kills(tmp_path: Path, step: str) -> None:
    path = tmp_path / "ledger.jsonl"
    members = {"a": Member(30, 7, 2), "b": Member(40, 7, 2), "c": Member(5, 7, 2)}

    async def work(ledger: Ledger) -> None:
        await ledger.plan_batch("tag", "http://server", "m", members)
        if step != "planned":
            await ledger.note_batch("tag", "creating", file="file-1")
        if step in ("created", "closed"):
            await ledger.note_batch("tag", "created", id="batch_1")
            await ledger.store_many({"a": answer(11)})
            ledger.lose_later("b", "no_row")
            await ledger.flush()
        if step == "closed":
            await ledger.note_batch("tag", "closed", status="completed")
        os.kill(os.getpid(), 9)

    child = os.fork()
    if child == 0:
        run(work(Ledger(path, max_nano=100)))
    os.waitpid(child, 0)
    for _ in range(2):  # opening it changes nothing
        ledger = Ledger(path, max_nano=100)
        spent, reserved = {
            "planned": (0, 0),  # nothing was sent that costs
            "creating": (0, 75),
            "created": (51, 5),
            "closed": (51, 0),
        }[step]
        assert (ledger.spent, ledger.reserved) == (spent, reserved)
        assert ledger.has_room(100 - spent - reserved)
        assert not ledger.has_room(101 - spent - reserved)
        assert list(ledger.batches) == (["tag"] if step in ("creating", "created") else [])
        if ledger.batches:
            batch = ledger.batches["tag"]
            assert (batch.server, batch.model, batch.members) == ("http://server", "m", members)
            assert (batch.step, batch.id) == (step, "batch_1" if step == "created" else "")
        ledger.close()
    ledger = Ledger(path)
    assert ledger.abandon_batches() == {"creating": 3, "created": 1}.get(step, 0)
    assert ledger.reserved == 0
    lost = {"creating": 75, "created": 56, "closed": 51, "planned": 0}[step]
    assert ledger.spent == lost
    ledger.close()
    assert Ledger(path).spent == lost


def test_one_process_at_a_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(RunError, match="another process"):
        Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    Ledger(tmp_path / "ledger.jsonl").close()


def test_prices(tmp_path: Path) -> None:
    # 1,000 prompt tokens at $0.15 and 500 completion tokens at $0.60 a million: $0.00045.
    assert Price(0.15, 0.60).nano_dollars(1000, 500) == 450_000
    file = tmp_path / "prices.yaml"
    file.write_text("gpt-x: {input: 0.15, output: 0.6}\n")
    assert read_prices(file) == {"gpt-x": Price(0.15, 0.6)}
    for bad in ("gpt-x: 3\n", "- 1\n", "a: {input: 1}\n", "a: {input: yes, output: 1}\n", "{"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"prices\.yaml"):
            read_prices(file)
    for value in (-1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="price"):
            Price(value, 1.0)
