"""Decontamination against brute force: trees, runs of words, the split, workers and kills."""

import ast
import gzip
import json
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.decontaminate.benchmarks import Fields, load_benchmarks
from data_pipeline.decontaminate.ngram_table import NgramTable
from data_pipeline.decontaminate.report import read_report, report_text
from data_pipeline.decontaminate.stage import DecontaminateOptions, plan_decontaminate
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, run_stage
from data_pipeline.similarity.ast_match import function_strings, functions_of, node_string
from tests.data_pipeline.record_files import read, write_records
from tests.data_pipeline.test_pipeline_crash import drive

pytest.importorskip("rapidfuzz")

from data_pipeline.similarity.ast_match import match_rates

# Problems of our own, in the two known forms.
HUMAN = [
    {
        "task_id": "Ours/0",
        "prompt": "def running_peak(values: list) -> list:\n"
        '    """For each position of a list of numbers return the largest number seen from the '
        'start of the list up to that position."""\n',
        "canonical_solution": "    result = []\n    peak = None\n    for value in values:\n"
        "        if peak is None or value > peak:\n            peak = value\n"
        "        result.append(peak)\n    return result\n",
        "entry_point": "running_peak",
        "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == [1, 3, 3]\n",
    },
    {
        "task_id": "Ours/1",
        "prompt": 'def shout(text):\n    """Make it loud."""\n',
        "canonical_solution": "    return text.upper()\n",
        "entry_point": "shout",
        "test": "",
    },
]
BASIC = [
    {
        "task_id": 11,
        "text": "Write a function to count the vowels of every word in a sentence.",
        "code": "def helper(a, b, c, d):\r\n"
        "    return [a + b, b + c, c + d, d + a, a * b * c * d]\r\n"
        "def count_vowels(text):\r\n    counts = {}\r\n    for word in text.split():\r\n"
        "        counts[word] = sum(1 for letter in word if letter in 'aeiou')\r\n"
        "    return counts",
        "test_list": ["assert count_vowels('an ape') == {'an': 1, 'ape': 2}"],
    }
]
RENAMED = (
    "import math\n\n\nclass Tool:\n    def best_so_far(self_values):\n"
    "        out = []\n        top = None\n        for item in self_values:\n"
    "            if top is None or item > top:\n                top = item\n"
    "            out.append(top)\n        return out\n"
)
EDITED = RENAMED.replace("return out", "print(out)\n        return out")
QUOTED = (
    "# For each position of a list of numbers, return the LARGEST number seen from the start\n"
    "x = 1\n"
)
SHORT = "Count the vowels"
CLEAN = (
    "def parse(path):\n    with open(path) as stream:\n        return [line.strip() for line in "
    "stream if line and not line.startswith('#')]\n"
)


def write_benchmarks(root: Path) -> list[Path]:
    with gzip.open(root / "human.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in HUMAN)
    (root / "basic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BASIC))
    return [root / "human.jsonl.gz", root / "basic.jsonl"]


def run(
    records: Path, out: Path, against: list[Path], workers: int = 1, **options: Any
) -> Manifest:
    stage, work = plan_decontaminate(
        [records], DecontaminateOptions(against=tuple(against), **options)
    )
    return run_stage(stage, work, out, Options(workers=workers, max_reject=1))[0]


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance by the textbook's table."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def nodes_by_recursion(node: ast.AST) -> list[object]:
    """The definition: types in pre-order, without what says nothing about structure."""
    if isinstance(node, ast.Constant):
        return [type(node.value)]
    found: list[object] = [type(node)]
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "ctx", "type_ignores"):
            continue
        children = value if isinstance(value, list) else [value]
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            children = children[1:]
        for child in children:
            if isinstance(child, ast.AST):
                found += nodes_by_recursion(child)
    return found


def library_functions() -> list[ast.FunctionDef]:
    import argparse
    import textwrap

    functions = []
    for module in (argparse, textwrap, random, re):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        functions += [f for f in functions_of(tree) if isinstance(f, ast.FunctionDef)]
    return functions


def test_node_strings_are_those_of_the_definition() -> None:
    functions = library_functions()
    assert len(functions) > 100
    symbols: dict[str, object] = {}
    for function in functions:
        string, expected = node_string(function, 10**6), nodes_by_recursion(function)
        assert len(string) == len(expected)
        for symbol, kind in zip(string, expected, strict=True):
            assert symbols.setdefault(symbol, kind) is kind
    assert len(set(symbols.values())) == len(symbols) > 40


def test_match_rates_are_exact() -> None:
    strings = [node_string(function, 10**6) for function in library_functions()]
    strings = sorted({string for string in strings if len(string) < 90})[:60]
    rates = match_rates(strings[:30], strings[30:], 0.3)
    seen = 0
    for i, first in enumerate(strings[:30]):
        for j, second in enumerate(strings[30:]):
            longer = max(len(first), len(second))
            rate = Fraction(longer - edit_distance(first, second), longer)
            matches = rate >= Fraction(3, 10)
            assert rates[i, j] == pytest.approx(float(rate) if matches else 0, abs=1e-6)
            seen += matches
    assert seen > 50


def test_ngram_hits_are_those_of_brute_force(tmp_path: Path) -> None:
    draw = random.Random(2)
    vocabulary = ["red", "Green", "blue_1", "x2", "çà", "7"]
    rows = [
        {"task_id": n, "text": " ".join(draw.choices(vocabulary, k=60)), "code": "x = 1"}
        for n in range(4)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_benchmarks([tmp_path / "b.jsonl"], Fields())

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower().replace("Ç", "ç"))
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    texts = []
    for _ in range(60):
        row = str(draw.choice(rows)["text"]).split()
        start = draw.randrange(40)
        middle = row[start : start + draw.randrange(8, 20)]
        noise = draw.choices(vocabulary, k=30)
        texts.append(
            ", ".join(noise[:15]) + " (" + "\n".join(middle).upper() + ") " + " ".join(noise)
        )
    texts = [text.replace("ÇÀ", "çà") for text in texts]
    found = NgramTable(problems, 13).hits(texts)
    expected = [{n: len(runs(t) & runs(row["text"])) for n, row in enumerate(rows)} for t in texts]
    assert [dict(counter) for counter in found] == [
        {n: count for n, count in counts.items() if count} for counts in expected
    ]
    assert 10 < sum(map(bool, found)) < 60


def test_twins_are_found_and_the_split_is_reported(tmp_path: Path) -> None:
    against = write_benchmarks(tmp_path)
    texts = [RENAMED, EDITED, QUOTED, SHORT, CLEAN, f"# Text\n\n```python\n{RENAMED}```\n", "x = ("]
    records = write_records(tmp_path, [[{"text": text, "n": n} for n, text in enumerate(texts)]])
    manifest = run(records, tmp_path / "out", against)
    numbers = {r["id"]: r["meta"]["n"] for r in read(records)}
    fates = {numbers[r["id"]]: r["reason"] for r in read(tmp_path / "out", "rejected")}
    assert fates == {0: "ast", 2: "ngram", 5: "ast"}
    assert manifest.rejected == {"ast": 2, "ngram": 1}
    kept = {r["meta"]["n"]: r for r in read(tmp_path / "out")}
    (hit,) = kept[1]["decon"]["hits"]
    strings = [
        node_string(next(functions_of(ast.parse(text))), 10**6)
        for text in (EDITED, HUMAN[0]["prompt"] + HUMAN[0]["canonical_solution"])
    ]
    rate = 1 - edit_distance(*strings) / max(map(len, strings))
    assert 0.8 < rate < 0.95
    expected = {"bench": "human", "task_id": "Ours/0", "method": "ast", "score": round(rate, 3)}
    assert hit == expected
    assert "decon" not in kept[4]
    report = read_report(tmp_path / "out")
    human, basic = report["benchmarks"]["human"], report["benchmarks"]["basic"]
    assert human["not_compared"] == ["Ours/1"]
    assert human["ngram"] == ["Ours/0"]
    assert [(row["tau"], row["similar"], row["non_similar"]) for row in human["split"]] == [
        *((0.95, 1, 1), (0.9, 1, 1), (0.85, 1, 1), (0.8, 1, 1))
    ]
    documents = [row["documents_with_twin"] for row in human["split"]]
    assert documents == [2 + (rate >= tau) for tau in (0.95, 0.9, 0.85, 0.8)]
    assert [row["similar"] for row in basic["split"]] == [0, 0, 0, 0]
    assert human["twins"][0]["rate"] == 1
    # SHORT, QUOTED and the last text: prose without code, a comment with `x = 1`, a torn line.
    assert report["not_parsed"] == 2
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text == report_text(report) + "\n"
    assert "human: 2 problems" in text
    hard = run(records, tmp_path / "hard", against, drop_at=0.8)
    assert hard.rejected == {"ast": 3, "ngram": 1}
    assert run(records, tmp_path / "words", against, ast=False).rejected == {"ngram": 1}
    assert run(records, tmp_path / "trees", against, ngram=0).rejected == {"ast": 2}


def test_a_short_statement_counts_as_a_whole(tmp_path: Path) -> None:
    against = write_benchmarks(tmp_path)
    problems = load_benchmarks(against, Fields())
    statement = "Write a function to find the middle element."  # 8 words
    (tmp_path / "short.jsonl").write_text(
        json.dumps({"task_id": 1, "text": statement, "code": "def f(a):\n    return a"}) + "\n"
    )
    problems = load_benchmarks([tmp_path / "short.jsonl"], Fields())
    table = NgramTable(problems, 13)
    whole = "# " + statement.upper() + " And then do something else with it.\n"
    partial = whole.replace("MIDDLE", "last")
    assert [dict(c) for c in table.hits([whole, partial, statement])] == [{0: 1}, {}, {0: 1}]


def test_the_solution_is_the_function_that_is_asked_for(tmp_path: Path) -> None:
    problems = load_benchmarks(write_benchmarks(tmp_path), Fields())
    assert [(p.benchmark, p.task_id) for p in problems] == [
        *(("human", "Ours/0"), ("human", "Ours/1"), ("basic", "11"))
    ]
    tree = ast.parse(BASIC[0]["code"].replace("\r\n", "\n"))  # type: ignore[attr-defined]
    assert problems[2].nodes == node_string(list(functions_of(tree))[1], 10**6)


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        ('{"task_id": 1, "text": "x"', {}, "bench.jsonl:1: not a JSON line"),
        ("[1]", {}, "bench.jsonl:1: not an object"),
        ('{"id": 1, "question": "x"}', {}, "no field 'task_id'; there are 'id', 'question'"),
        (
            '{"id": 1, "question": 2}',
            {"id_field": "id", "text_field": ("question",)},
            "question: is int",
        ),
        ("", {}, "no problem"),
    ],
)
def test_wrong_benchmarks_are_named(
    tmp_path: Path, line: str, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / "bench.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_benchmarks([tmp_path / "bench.jsonl"], Fields(**fields))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_benchmarks([tmp_path / "absent.jsonl"], Fields())


def test_own_fields(tmp_path: Path) -> None:
    row = {"id": "q1", "question": "What is it?", "answer": HUMAN[0]["prompt"] + "    pass\n"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    fields = Fields(id_field="id", text_field=("question",), code_field="answer")
    (problem,) = load_benchmarks([tmp_path / "own.jsonl"], fields)
    assert (problem.task_id, problem.prose) == ("q1", ("What is it?",))
    assert problem.nodes


def test_hostile_texts_end_in_exactly_one_place(tmp_path: Path) -> None:
    texts = [
        "( " * 50_000,
        "x = " + "- " * 200_000 + "1",
        "x = " + " + ".join(["1"] * 50_000),
        "if x:\n    pass\n" + "elif x:\n    pass\n" * 5_000,
        "```python\n" * 5_000,
        "".join(" " * n + f"def f{n}():\n" for n in range(90)) + " " * 90 + "pass\n",
        "x = 'a\u2028b\x85'\n",
        CLEAN,
    ]
    records = write_records(tmp_path, [[{"text": text} for text in texts]])
    run(records, tmp_path / "out", write_benchmarks(tmp_path))
    ids = [r["id"] for r in read(tmp_path / "out") + read(tmp_path / "out", "rejected")]
    assert sorted(ids) == sorted(r["id"] for r in read(records))
    assert len(ids) == len(texts)
    assert read_report(tmp_path / "out")["not_parsed"] >= 3


def variants() -> list[list[dict[str, Any]]]:
    texts = [RENAMED, EDITED, QUOTED, CLEAN, "x = 1\n"] * 4
    rows = [{"text": f"{text}# {n}\n"} for n, text in enumerate(texts)]
    return [rows[n::4] for n in range(4)]


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    against = write_benchmarks(tmp_path)
    records = write_records(tmp_path, variants())
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        run(records, out, against, workers)
        files = sorted(p for p in out.iterdir() if p.name != "manifest.json")
        found.append({p.name: p.read_bytes() for p in files})
    assert found[0] == found[1] == found[2]
    assert {"report.json", "report.txt", "rejected-00000.jsonl"} <= set(found[0])


def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    against = [str(path) for path in write_benchmarks(tmp_path)]
    records = write_records(tmp_path, variants()[:2])
    argv = ["data", "decontaminate", str(records), "--out", str(tmp_path / "out")]
    argv += ["--against", *against, "--workers", "1"]
    report = drive(tmp_path, "out", "out/manifest.json", argv)
    assert report["killed"] >= 1
    assert "out/report.json" in str(report["files"])


def test_functions_of_a_text(tmp_path: Path) -> None:
    request = {"text": RENAMED, "shortest": 1, "longest": 1000}
    assert function_strings(request) == function_strings({**request, "text": RENAMED * 2})
    assert function_strings({**request, "text": "def ("}) is None
    assert function_strings({**request, "longest": 5}) == []
