"""What a server says of its own answers is checked: usage, thoughts, ends, errors, parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from data_pipeline.annotation.sample import read_records
from data_pipeline.llm.prompts import read_score
from data_pipeline.llm.thoughts import without_thoughts
from tests.data_pipeline.llm_server import Asked, BatchServer, Reply, ScriptedServer, completion
from tests.data_pipeline.test_llm_annotate import judge
from tests.data_pipeline.test_llm_batch import FAST
from tests.data_pipeline.test_llm_generate import NAME, generate, ledger_lines, make
from tools.cli import main


def written(asked: Asked) -> str:
    """A sound exercise with the answer 7, of the name that was asked for."""
    found = NAME.search(asked.prompt)
    assert found is not None
    lines = "\n".join(f"    {found[1]}_{step} = {step}" for step in range(12))
    head = f'def {found[1]}(value):\n    """Find out what {asked.key[:8]} means."""'
    return f"```python\n{head}\n{lines}\n    return 7\n```"


def changed(change: Callable[[dict[str, Any], Asked], None]) -> Callable[[Asked, int], Reply]:
    """A server whose sound answers are changed."""

    def script(asked: Asked, before: int) -> Reply:
        body = completion(written(asked))
        change(body, asked)
        return Reply(body)

    return script


def message(body: dict[str, Any]) -> dict[str, Any]:
    return body["choices"][0]["message"]


DRAFT = "```python\ndef {name}(x):\n    '''Draft of the task only here.'''\n    return 1\n```"


def think(open_: str, close: str, repeat: int = 1) -> Callable[[dict[str, Any], Asked], None]:
    def change(body: dict[str, Any], asked: Asked) -> None:
        found = NAME.search(asked.prompt)
        assert found is not None
        draft = f"{open_}\nOkay, a draft:\n{DRAFT.format(name=found[1])}\nWait.\n{close}\n\n"
        message(body)["content"] = draft * repeat + message(body)["content"]

    return change


def parts(body: dict[str, Any], asked: Asked) -> None:
    draft = [{"type": "text", "text": "Okay, a draft"}]
    message(body)["content"] = [
        {"type": "thinking", "thinking": draft},
        {"type": "text", "text": message(body)["content"]},
    ]


def copied(body: dict[str, Any], asked: Asked) -> None:
    message(body)["reasoning_content"] = "Okay, a draft"
    message(body)["content"] = "Okay, a draft\n" + message(body)["content"]


@pytest.mark.parametrize(
    "change",
    [
        think("<think>", "</think>"), think("", "</think>"), think("<think>", "</think>", 2),
        think("<Thinking>", "</Thinking>"), think("[THINK]", "[/THINK]"), parts, copied,
        think("<seed:think>", "</seed:think>"), think("&lt;think&gt;", "&lt;/think&gt;"),
        think("<think>a <think> b </think>", "</think>"), think("◁think▷", "◁/think▷"),
    ],
)  # fmt: skip
def test_thoughts_never_reach_a_record(
    tmp_path: Path, change: Callable[[dict[str, Any], Asked], None]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 2)
    with ScriptedServer(changed(change)) as server:
        assert main(generate(plan, server.url, out)) == 0
    kept = [record["text"] for _, record in read_records([out])]
    assert len(kept) == 2
    for text in kept:
        assert "Okay" not in text
        assert "raft" not in text
        assert text.endswith("return 7\n"), "the answer, not the draft"


def test_thoughts_without_an_end_are_no_answer() -> None:
    assert without_thoughts("plain text, 1 < 2 > 0") == "plain text, 1 < 2 > 0"
    assert without_thoughts("<think>a</think>\n\nb") == "b"
    for content in ("<think>a", "a</think>b<think>c", "Well. <think>a</think> b"):
        assert without_thoughts(content) is None
    assert without_thoughts("<think>a</think>") == ""


@pytest.mark.parametrize("reason", ["stop", None, "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_used_all_its_tokens_is_cut_off(tmp_path: Path, reason: Any) -> None:
    def change(body: dict[str, Any], asked: Asked) -> None:
        body["choices"][0]["finish_reason"] = reason
        body["usage"]["completion_tokens"] = 100 if reason in ("stop", None) else 60

    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    with ScriptedServer(changed(change)) as server:
        assert main(generate(plan, server.url, out)) == 1
    rejected = json.loads((tmp_path / "out.rejected" / "manifest.json").read_text())["rejected"]
    assert rejected == {"truncated": 3}


def test_a_server_that_counts_nothing_cuts_nothing_off(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    with ScriptedServer(changed(lambda body, asked: body.pop("usage"))) as server:
        assert main(generate(plan, server.url, out)) == 0
    assert len(list(read_records([out]))) == 3


USAGES: list[dict[str, Any]] = [
    {"prompt_tokens": 50, "completion_tokens": 9000},
    {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 9050},
    {"prompt_tokens": 50, "completion_tokens": 50,
     "completion_tokens_details": {"reasoning_tokens": 8950}},
    {"prompt_tokens": 9000, "completion_tokens": 50},
]  # fmt: skip


@pytest.mark.parametrize("usage", USAGES)
def test_usage_above_the_bound_is_booked_and_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], usage: dict[str, Any]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 30)
    with ScriptedServer(changed(lambda body, asked: body.update(usage=usage))) as server:
        arguments = generate(plan, server.url, out, "--max-cost", "5", "--partial")
        assert main(arguments) == 1
        assert len(server.asked) == 1, "the first goes alone"
        error = capsys.readouterr().err
        assert "9000" in error
        assert "--reasoning-tokens" in error
        (line,) = [line for line in ledger_lines(out) if line["kind"] == "answer"]
        # $1 a thousand tokens of either kind
        assert line["nano"] == 9050 * 10**6
        # The cap of $5 is behind: what there is would be published, had it not run out of tokens.
        assert main(arguments) == int(usage["prompt_tokens"] == 50)
        assert len(server.asked) == 1


def no_answer(body: dict[str, Any], asked: Asked) -> None:
    message(body)["content"] = None
    message(body)["reasoning_content"] = "Okay, let me think"
    body["choices"][0]["finish_reason"] = "length"


def refusal(body: dict[str, Any], asked: Asked) -> None:
    message(body)["refusal"] = "I cannot help."


def endless(body: dict[str, Any], asked: Asked) -> None:
    message(body)["content"] = "<think>\nOkay, the user wants"


@pytest.mark.parametrize(
    ("change", "cause", "option"),
    [(no_answer, "truncated", "--reasoning-tokens"), (endless, "thoughts", "--reasoning-tokens"),
     (refusal, "refused", "--model")],
)  # fmt: skip
def test_a_plan_that_yields_nothing_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, cause: str, option: str
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 200)
    with ScriptedServer(changed(change)) as server:
        assert main(generate(plan, server.url, out)) == 1
        assert len(server.asked) <= 8 + 16, "eight, and what was under way"
        error = capsys.readouterr().err.splitlines()[-1]
        assert cause in error
        assert option in error
        asked = len(server.asked)
        assert main(generate(plan, server.url, out)) == 1
        assert len(server.asked) == asked, "the ledger says so already"


def test_annotators_without_a_score_are_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(lambda asked, before: Reply(completion("banana"))) as server:
        assert main(annotation(tmp_path, 120, server.url)) == 1
        assert len(server.asked) <= 32 + 16
    assert "'banana'" in capsys.readouterr().err


def annotation(tmp_path: Path, documents: int, url: str, *more: str) -> list[str]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    for number in range(documents):
        text = f"# lesson {number}: how to add\nprint(1 + {number})\n"
        (source / f"a{number}.py").write_text(text)
    records = tmp_path / "records"
    assert main(["data", "ingest", str(source), "--out", str(records), "--workers", "1"]) == 0
    return [
        *("data", "annotate", str(records), "--samples", str(documents), "--model", "m"),
        *("--base-url", url, "--out", str(tmp_path / "labels"), "--json", *more),
    ]


NO_MONEY = [
    (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
    (429, {"error": {"message": "You exceeded your quota", "type": "insufficient_quota"}}),
    (402, {"error": {"message": "Insufficient balance"}}),
    (200, {"error": {"message": "Insufficient credits", "code": 402}}),
]


@pytest.mark.parametrize(("status", "body"), NO_MONEY)
def test_an_empty_account_ends_the_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, body: dict[str, Any]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 40)
    reply = Reply(body, status, {"Retry-After": "86400"})
    with ScriptedServer(lambda asked, before: reply) as server:
        assert main(generate(plan, server.url, out, "--max-wait", "60")) == 1
        assert len(server.asked) == 1
    error = capsys.readouterr().err
    assert "used up" in error
    assert body["error"]["message"] in error
    assert [line["kind"] for line in ledger_lines(out)] == ["reserve", "free"]


def test_too_many_requests_for_now_is_waited_for(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    busy = Reply({"error": {"message": "quota per minute", "code": "rate_limit_exceeded"}}, 429)

    def script(asked: Asked, before: int) -> Reply:
        return busy if before == 0 else Reply(completion(written(asked)))

    with ScriptedServer(script) as server:
        assert main(generate(plan, server.url, out)) == 0
    assert len(list(read_records([out]))) == 3


ERRORS: list[dict[str, Any]] = [
    {"error": {"message": "Provider returned error", "code": 502}},
    {"error": "Provider returned error"},
    {"object": "error", "message": "Provider returned error", "code": 50001},
    completion("half", choices=[{"message": {"content": "half"}, "finish_reason": "error",
                                 "error": {"message": "Provider returned error", "code": 502}}]),
]  # fmt: skip


@pytest.mark.parametrize("body", ERRORS)
@pytest.mark.parametrize("backend", ["live", "batch"])
def test_errors_that_come_as_answers_keep_their_words_and_cost_nothing(
    tmp_path: Path, body: dict[str, Any], backend: str
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    entries = make(plan, 3)

    def script(asked: Asked, before: int) -> Reply:
        failed = entries[1].fields["name"] in asked.prompt
        return Reply(body if failed else completion(written(asked)))

    kind, more = (BatchServer, FAST) if backend == "batch" else (ScriptedServer, ())
    with kind(script) as server:
        assert main(generate(plan, server.url, out, "--attempts", "2", *more)) == 0
    (reject,) = map(json.loads, (out / "rejected-00000.jsonl").read_text().splitlines())
    assert reject["reason"] == "no_answer"
    assert "Provider returned error" in reject["detail"]
    report = json.loads((out / "report.json").read_text())["traffic"]
    assert report["ledger_lost_requests"] == 0
    assert report["ledger_dollars"] == pytest.approx(2 * 60 / 1000)


ROWS: list[dict[str, Any]] = [
    {"response": {"status_code": 400, "body": {"error": {"message": "context too long"}}}},
    {"response": None, "error": {"code": "server_error", "message": "context too long"}},
    {"response": {"status_code": 0}, "error": {"code": "x", "message": "context too long"}},
]


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_a_batch_keep_the_servers_words(tmp_path: Path, row: dict[str, Any]) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)

    def finish(batch: dict[str, Any]) -> None:
        spoilt = min(batch["ok"], key=lambda each: each["custom_id"])
        spoilt.update({"error": None, **row})

    with BatchServer(lambda a, before: Reply(completion(written(a))), finish=finish) as server:
        assert main(generate(plan, server.url, out, *FAST, "--batch-rounds", "1")) == 0
    (reject,) = map(json.loads, (out / "rejected-00000.jsonl").read_text().splitlines())
    assert "context too long" in reject["detail"]
    report = json.loads((out / "report.json").read_text())["traffic"]
    assert report["ledger_lost_requests"] == 0


def test_a_batch_of_an_empty_account_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 3)
    empty = Reply({"error": {"message": "No credit left", "code": "insufficient_quota"}}, 429)
    with BatchServer(lambda asked, before: empty) as server:
        assert main(generate(plan, server.url, out, *FAST)) == 1
        assert len(server.batches) == 1
    assert "No credit left" in capsys.readouterr().err
    assert all(line["kind"] != "lost" for line in ledger_lines(out))


def test_parameters_are_left_out_renamed_and_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "temperature": ("--leave-out", "temperature"),
        "seed": ("--leave-out", "seed"),
        "max_tokens": ("--rename", "max_tokens=max_completion_tokens"),
        "response_format": ("--answers", "text"),
        "system": ("--merge-system",),
    }

    def script(asked: Asked, before: int) -> Reply:
        named = {**asked.body, **{each["role"]: 1 for each in asked.body["messages"]}}
        for name in refused:
            if name in named:
                return Reply({"error": {"message": f"Unsupported: {name!r}"}}, 400)
        # the last line of the prompt, as the judge of the other tests expects two messages
        asked.body["messages"] = [{}, *asked.body["messages"]]
        body = judge(asked, before).body
        message(body)["content"] = str(json.loads(message(body)["content"])["score"])
        return Reply(body)

    with ScriptedServer(script) as server:
        arguments = annotation(tmp_path, 8, server.url)
        for name, options in refused.items():
            assert main(arguments) == 1
            error = capsys.readouterr().err
            assert f"Unsupported: '{name}'" in error
            assert options[0] in error
            arguments += options
        arguments += ["--set", "reasoning_effort=low", "--set", 'thinking={"budget_tokens": 50}']
        arguments += ["--reasoning-tokens", "500"]
        assert main(arguments) == 0
        body = server.asked[-1].body
    assert {name: value for name, value in body.items() if name not in ("model", "messages")} == {
        "max_completion_tokens": 508, "reasoning_effort": "low", "thinking": {"budget_tokens": 50},
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [("--leave-out", "top_p"), ("--rename", "top_p=p"), ("--leave-out", "max_tokens"),
     ("--set", "n=4"), ("--set", "stream=true"), ("--rename", "seed=temperature"),
     ("--rename", "max_tokens"), ("--set", "a=1", "--set", "a=2"), ("--reasoning-tokens", "-1")],
)  # fmt: skip
def test_parameters_that_cannot_be_changed_so(tmp_path: Path, options: tuple[str, ...]) -> None:
    with ScriptedServer(judge) as server:
        assert main(annotation(tmp_path, 3, server.url, *options)) == 2
        assert server.asked == []


def test_scores_in_a_fence_are_read() -> None:
    for text in (
        '```json\n{"score": 4}\n```',
        ' ```\n{"score": 4}\n``` \n',
        '~~~json\n{"score":4}\n~~~',
    ):
        assert read_score(text, "schema") == 4
    for text in ('```json\n{"score": 4}', '```python\n{"score": 4}\n```', "```\n4\n```"):
        assert read_score(text, "schema") is None
    assert read_score("```\n4\n```", "text") == 4


def test_a_ledger_of_before_is_read_without_its_thoughts(tmp_path: Path) -> None:
    """The ledger keeps what was paid; what is made of it follows the rules of today."""
    plan, out = tmp_path / "plan.jsonl", tmp_path / "out"
    make(plan, 2)
    with ScriptedServer(changed(think("<think>", "</think>"))) as server:
        assert main(generate(plan, server.url, out)) == 0
        lines = [line for line in ledger_lines(out) if line["kind"] == "answer"]
        assert all("Okay, a draft" in line["answer"]["content"] for line in lines)
        assert set(lines[0]["answer"]) == {
            "content", "finish_reason", "problem", "served_model", "prompt_tokens",
            "completion_tokens", "nano",
        }  # fmt: skip
        assert main(generate(plan, server.url, out, "--overwrite")) == 0
        assert len(server.asked) == 2
