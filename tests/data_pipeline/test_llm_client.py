"""The client against a server that misbehaves in every way that we could think of."""

import asyncio
import gzip
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import pytest

pytest.importorskip("openai")

from data_pipeline.llm.client import Client
from data_pipeline.llm.completion import Request
from data_pipeline.llm.connection import CallError, parse_retry_after
from data_pipeline.llm.ledger import Answer
from data_pipeline.llm.prices import Price
from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import parse_base_url
from megaphi.errors import RunError
from tests.data_pipeline.llm_server import CHAT, Reply, ScriptedServer, completion

KEY = "sk-test-93hfKd83jf"
REQUEST = Request(
    model="m",
    messages=[{"role": "user", "content": "Wörter"}],
    parameters={"temperature": 0},
    max_tokens=100,
)


@contextmanager
def served(reply: Reply) -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda asked, before: reply) as server:
        yield server


def ask(url: str, deadline: float = 20.0, max_body: int = 100_000) -> Answer:
    async def work() -> Answer:
        key = Secret(KEY)
        client = Client(
            parse_base_url(url),
            key,
            Price(1, 2),
            Redactor([key]),
            deadline=deadline,
            max_body=max_body,
        )
        async with client:
            return await client.ask(REQUEST)

    return asyncio.run(work())


def problem(reply: Reply, **options: float) -> CallError:
    with served(reply) as server, pytest.raises(CallError) as caught:
        ask(server.url, **options)
    assert KEY not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value


def test_a_good_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment says must not reach a server that the user has not named.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-provider")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Private: private")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with served(Reply(completion("fine"))) as server:
        answer = ask(server.url)
    (asked,) = server.asked
    assert answer.content == "fine"
    assert (answer.prompt_tokens, answer.completion_tokens) == (50, 10)
    assert answer.nano == 50 * 1000 + 10 * 2000
    assert asked.path == CHAT
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["idempotency-key"] == REQUEST.key
    assert "private" not in json.dumps(asked.headers)
    assert "another" not in json.dumps(asked.headers)
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Wörter"}],
        "temperature": 0,
        "max_tokens": 100,
    }


CHOICE = completion("x")["choices"][0]
MALFORMED: dict[str, Any] = {
    "no JSON": b"<html>",
    "half a JSON": json.dumps(completion("x")).encode()[:-20],
    "no UTF-8": b'{"choices": "\xff\xfe"}',
    "nested too deep": b"[" * 50_000,
    "a number of 5000 digits": b"1" * 5000,
    "empty": b"",
    "a list": [],
    "null": None,
    "no choices": completion("x", choices=[]),
    "choices missing": {"id": "x"},
    "two choices": completion("x", choices=[CHOICE, CHOICE]),
    "choices by name": completion("x", choices={"0": CHOICE}),
    "a choice that is text": completion("x", choices=["text"]),
    "a message that is text": completion("x", choices=[{"message": "text"}]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_answers_that_are_none(name: str) -> None:
    error = problem(Reply(MALFORMED[name]))
    assert error.reason == "malformed"
    assert error.billed, "the server may have charged for it"


UNUSABLE: dict[str, Any] = {
    "no_content": [None, "", " \n", 7, ["x"], {"text": "x"}],
    "surrogate": ["half \ud83d a character"],
    "nul": ["a\0b"],
    "key_echo": [f"your key is {KEY}"],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_contents_that_cannot_be_used_are_paid_and_not_kept(reason: str) -> None:
    for content in UNUSABLE[reason]:
        with served(Reply(completion(content))) as server:
            answer = ask(server.url)
        assert (answer.problem, answer.content) == (reason, None)
        assert answer.nano == 70_000
        json.dumps(vars(answer)).encode("ascii")


@pytest.mark.parametrize(
    "usage",
    [None, "many", {}, {"prompt_tokens": -5, "completion_tokens": 10**30},
     {"prompt_tokens": True, "completion_tokens": 1.5}, {"prompt_tokens": math.nan}],
)  # fmt: skip
def test_counts_that_cannot_be_true_cost_the_bound(usage: Any) -> None:
    with served(Reply(completion("x", usage=usage))) as server:
        answer = ask(server.url)
    assert answer.prompt_tokens == REQUEST.prompt_bound == 7 + 256
    assert answer.completion_tokens == 100


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_errors_that_may_pass(status: int) -> None:
    error = problem(Reply({"error": f"Authorization: Bearer {KEY}"}, status))
    assert error.reason == f"http_{status}"
    assert (error.retry, error.billed) == (True, False)
    assert error.overloaded == (status in (429, 503, 529))
    assert "[API key]" in str(error)


@pytest.mark.parametrize("status", [401, 403, 402, 404, 405])
def test_errors_that_end_the_run(status: int) -> None:
    reply = Reply({"error": f"bad key {KEY}\n" + "x" * 50_000}, status)
    with served(reply) as server, pytest.raises(RunError) as caught:
        ask(server.url)
    assert KEY not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_request_that_is_refused_is_not_repeated() -> None:
    error = problem(Reply({"error": "context too long"}, 400))
    assert (error.reason, error.retry, error.billed) == ("http_400", False, False)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with served(Reply(completion("stolen"))) as other:
        for target in (other.url + "/chat/completions", "http://169.254.169.254/latest"):
            reply = Reply(b"", status, {"Location": target})
            with served(reply) as server, pytest.raises(RunError, match="redirects"):
                ask(server.url)
        assert other.asked == []


def drip(seconds: float) -> Any:
    def write(stream: Any) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stream.write(b" ")
            stream.flush()
            time.sleep(0.02)

    return write


def flood(stream: Any) -> None:
    while True:  # until the client hangs up
        stream.write(b"x" * 65536)


@pytest.mark.parametrize("status", [200, 500])
def test_a_slow_drip_ends_at_the_deadline(status: int) -> None:
    error = problem(Reply(None, status, write=drip(30)), deadline=0.5)
    assert (error.reason, error.billed) == ("timeout", True)


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_endless_answer_is_cut_off(status: int) -> None:
    error = problem(Reply(None, status, write=flood))
    assert (error.reason, error.billed) == ("malformed", True)
    assert "longer than 100000 bytes" in str(error)


def test_a_body_of_a_gigabyte_is_not_taken() -> None:
    sent = 0

    def gigabyte(stream: Any) -> None:
        nonlocal sent
        while sent < 10**9:
            sent += stream.write(b"x" * 65536)

    error = problem(Reply(None, 200, {"Content-Length": str(10**9)}, write=gigabyte))
    assert (error.reason, error.billed) == ("malformed", True)
    assert sent < 50 * 10**6, "what is beyond the limit is in the buffers of the sockets"


def test_a_body_that_is_announced_and_does_not_come() -> None:
    reply = Reply(None, 200, {"Content-Length": str(10**9)}, write=lambda stream: None)
    error = problem(reply)
    assert (error.reason, error.billed) == ("connection", True)


def test_a_compressed_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(b"0" * 50_000_000)
    for encoding in ("gzip", "GZIP", "deflate, gzip", "br"):
        error = problem(Reply(bomb, headers={"Content-Encoding": encoding}))
        assert "compressed" in str(error)


def test_a_server_that_is_not_there() -> None:
    with served(Reply({})) as server:
        url = server.url
    with pytest.raises(CallError) as caught:
        ask(url)
    assert (caught.value.reason, caught.value.billed) == ("connection", False)


def test_retry_after() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("1000000000") == 1e9
    assert parse_retry_after("-3") == 0
    assert parse_retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(
        100, abs=5
    )
    for nonsense in (None, "", "soon", "nan", "inf", "1" * 5000, "Mon, 99 Foo 2020 99:99:99 GMT"):
        assert parse_retry_after(nonsense) is None


def test_the_key_of_a_request_is_its_content() -> None:
    changes = (
        {"model": "n"},
        {"messages": [{"role": "user", "content": "Worte"}]},
        {"parameters": {"temperature": 1}},
        {"max_tokens": 101},
    )
    keys = {REQUEST.key, *(Request(**{**vars(REQUEST), **change}).key for change in changes)}
    assert len(keys) == 5
    assert Request(**vars(REQUEST)).key == REQUEST.key
