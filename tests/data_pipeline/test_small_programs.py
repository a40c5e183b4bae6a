"""The small world: what is taught is right, the same to the byte, and holds nothing of a suite."""

import ast
import collections
import dataclasses
import doctest
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.records.record import record_line
from data_pipeline.small_programs.body import write_body
from data_pipeline.small_programs.exercise import check, execute, write_exercise
from data_pipeline.small_programs.options import ComposeOptions
from data_pipeline.small_programs.primitives import Primitive, all_primitives
from data_pipeline.small_programs.stage import plan_compose, samples_of
from data_pipeline.small_programs.suite import make_suite
from data_pipeline.small_programs.values import SHAPES, TYPES, draw
from data_pipeline.small_programs.world import TOO_WIDE, run, world_of
from megaphi.errors import RunError
from tests.data_pipeline.record_files import read
from tests.helpers import child_environment
from tools.cli import main

FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)


def inputs_of(kind: str, count: int) -> list[Any]:
    """Inputs of every shape, others than those on which fingerprints are taken."""
    rng = random.Random(f"test {kind}")
    return [draw(kind, SHAPES[i % len(SHAPES)], rng) for i in range(count)]


def compose(**options: Any) -> list[dict[str, Any]]:
    return list(samples_of(ComposeOptions(**options)))


def test_a_hundred_primitives_each_with_idioms_and_wordings() -> None:
    primitives = all_primitives().values()
    assert len(primitives) >= 100
    assert {p.takes for p in primitives} == {p.gives for p in primitives} == set(TYPES)
    for primitive in primitives:
        assert len(primitive.idioms) >= 2, primitive.name
        assert len(set(primitive.phrasings)) >= 4, primitive.name


def test_every_idiom_does_what_the_reference_says() -> None:
    for primitive in all_primitives().values():
        narrow = [v for v in inputs_of(primitive.takes, 60) if run([primitive], v) is not TOO_WIDE]
        assert len(narrow) >= 20, primitive.name
        wanted = [repr(run([primitive], value)) for value in narrow]
        for number, idiom in enumerate(primitive.idioms):
            only = dataclasses.replace(primitive, idioms=(idiom,))
            lines = write_body((only,), "f", "given", random.Random(0), idioms=0, names=0)
            code = "def f(given):\n" + "".join(f"    {line}\n" for line in lines)
            assert execute(code, "f", narrow) == wanted, f"{primitive.name}, idiom {number}"


@pytest.mark.parametrize(
    "body", ["    return None\n", "    raise KeyError\n", "    while True:\n        pass\n"]
)
def test_code_that_disagrees_or_does_not_end_is_never_written(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.small_programs.exercise.MAX_SECONDS", 0.2)
    world = world_of(ComposeOptions(kind="exercises", samples=1, world="figure").world_key())
    function = write_exercise(world, random.Random(1), wrong=0.0, among=[])
    with pytest.raises(RunError, match=function.name):
        check(dataclasses.replace(function, body=body))


@pytest.mark.parametrize("kind", ["exercises", "textbooks"])
def test_examples_in_docstrings_pass_doctest(kind: str) -> None:
    examples = 0
    for row in compose(kind=kind, samples=150):
        code = row["text"] if kind == "exercises" else FENCED.findall(row["text"])[0]
        assert ast.get_docstring(ast.parse(code).body[0]) is not None
        space: dict[str, Any] = {}
        exec(code, space)
        for test in doctest.DocTestFinder().find(space[row["meta"]["entry_point"]], globs=space):
            result = doctest.DocTestRunner(verbose=False).run(test)
            assert result.failed == 0, row["text"]
            examples += result.attempted
    assert examples > 100


def behaviour(code: str, name: str, steps: list[str], inputs: list[Any]) -> list[str | None]:
    """What a function returns; None where its steps would outgrow the world."""
    composition = [all_primitives()[step] for step in steps]
    narrow = [run(composition, value) is not TOO_WIDE for value in inputs]
    results = iter(execute(code, name, [v for v, fits in zip(inputs, narrow, strict=True) if fits]))
    return [next(results) if fits else None for fits in narrow]


def is_same(one: list[str | None], other: list[str | None]) -> bool:
    both = [(a, b) for a, b in zip(one, other, strict=True) if None not in (a, b)]
    return len(both) >= 10 and all(a == b for a, b in both)


def functions_of(rows: list[dict[str, Any]]) -> list[tuple[str, list[str | None]]]:
    """Of each function of a corpus its input type, and what it returns."""
    found = []
    for row in rows:
        meta = row["meta"]
        for code in FENCED.findall(row["text"]) or [row["text"]]:
            steps = meta.get("written", meta["composition"])
            kind = all_primitives()[steps[0]].takes
            found.append((kind, behaviour(code, meta["entry_point"], steps, INPUTS[kind])))
    return found


INPUTS = {kind: inputs_of(kind, 48) for kind in TYPES if kind != "bool"} | {"bool": []}


@pytest.mark.parametrize("world", ["quickstart", "figure"])
def test_no_training_text_does_what_a_held_out_problem_does(world: str) -> None:
    depths = range(2, 3 if world == "quickstart" else 4)
    groups = tuple(f"held-out-depth-{depth}" for depth in depths)
    suite = list(make_suite(ComposeOptions(kind="suite", samples=120, world=world, groups=groups)))
    corpus = [
        *compose(kind="exercises", samples=800, world=world),
        *compose(kind="exercises", samples=300, world=world, wrong=1.0, seed=5),
        *compose(kind="textbooks", samples=200, world=world),
    ]
    taught: dict[str, list[list[str | None]]] = collections.defaultdict(list)
    for kind, results in functions_of(corpus):
        taught[kind].append(results)
    for row in suite:
        kind = all_primitives()[row["composition"][0]].takes
        code = row["prompt"] + row["canonical_solution"]
        results = behaviour(code, row["entry_point"], row["composition"], INPUTS[kind])
        assert not any(is_same(results, other) for other in taught[kind]), row["prompt"]
    # the comparison sees a function that is written in another way
    code = "def f(a):\n    b = len(a)\n    return b * b\n"
    other = behaviour(code, "f", ["count_items", "square"], INPUTS["ints"])
    assert any(is_same(other, results) for results in taught["ints"])


def test_wordings_and_primitives_that_are_held_out_occur_in_no_exercise() -> None:
    options: dict[str, Any] = {"world": "figure", "samples": 1500}
    exercises, textbooks = (
        compose(kind="exercises", **options),
        compose(kind="textbooks", **options),
    )
    used = {step for row in exercises for step in row["meta"]["composition"]}
    told = {step for row in textbooks for step in row["meta"]["composition"]}
    suite = list(make_suite(ComposeOptions(kind="suite", **(options | {"samples": 120}))))
    only = {row["composition"][0] for row in suite if row["group"] == "textbook-only"}
    assert only
    assert only <= told
    assert not only & used
    texts = [row["text"] for row in (*exercises, *textbooks)]
    found = 0
    for row in suite:
        if row["group"] == "held-out-phrasing":
            for name in row["composition"]:
                parts = all_primitives()[name].phrasings[-1].split("X")
                words = re.compile("[^.\n]+".join(map(re.escape, parts)))
                found += words.search(row["prompt"]) is not None
                assert not any(map(words.search, texts)), words
    assert found > 10


def test_a_share_of_bodies_is_wrong_and_the_docstring_stays_right() -> None:
    rows = compose(kind="exercises", samples=600, world="figure", wrong=0.5)
    wrong = [row for row in rows if "written" in row["meta"]]
    assert 200 < len(wrong) < 400
    by_name = all_primitives()
    differing = 0
    for row in wrong:
        steps = [by_name[name] for name in row["meta"]["composition"]]
        inputs = [v for v in inputs_of(steps[0].takes, 60) if run(steps, v) is not TOO_WIDE]
        said = [repr(run(steps, value)) for value in inputs]
        done = [by_name[name] for name in row["meta"]["written"]]
        inputs = [value for value in inputs if run(done, value) is not TOO_WIDE]
        said = [repr(run(steps, value)) for value in inputs]
        differing += execute(row["text"], row["meta"]["entry_point"], inputs) != said
    assert differing > 0.9 * len(wrong)  # the rest differ on rarer inputs


def test_options_narrow_repeat_and_limit() -> None:
    narrow = compose(kind="exercises", samples=300, world="figure", compositions=7)
    assert len({tuple(row["meta"]["composition"]) for row in narrow}) == 7
    repeated = compose(kind="exercises", samples=300, world="figure", repetition=3)
    assert set(collections.Counter(row["text"] for row in repeated).values()) == {3}
    assert len({row["id"] for row in repeated}) == 300
    shallow = compose(kind="exercises", samples=300, depth=1, primitives=12, textbook_only=0)
    assert {len(row["meta"]["composition"]) for row in shallow} == {1}
    assert len({row["meta"]["composition"][0] for row in shallow}) <= 12
    plain = compose(kind="exercises", samples=300, styles=1, parameter_names=1, type_hints="no")
    heads = [row["text"].split("\n")[0] for row in plain]
    parameters = {re.findall(r"\((\w+)\):$", head)[0] for head in heads}
    assert len(parameters) <= len(TYPES)
    assert all('"""Return ' in row["text"] for row in plain)
    with pytest.raises(ValueError, match="5000: only"):
        compose(kind="exercises", samples=1, primitives=5, textbook_only=0, compositions=5000)


def corpus_digest(rows: Any) -> str:
    return hashlib.sha256(b"".join(map(record_line, rows))).hexdigest()


PRINT_DIGESTS = """
from tests.data_pipeline.test_small_programs import *
for kind in ("exercises", "textbooks"):
    print(corpus_digest(compose(kind=kind, samples=40, seed=9)))
print(corpus_digest(make_suite(ComposeOptions(kind="suite", samples=24, seed=9))))
"""


def test_texts_depend_on_seed_and_options_alone() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        environment = child_environment() | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PRINT_DIGESTS]
        digests.add(subprocess.check_output(command, env=environment, text=True))
    assert len(digests) == 1
    assert digests.pop().split() == GOLDEN, "raise VERSION in stage.py when texts change"
    longer = compose(kind="exercises", samples=60, seed=9)
    assert [r["text"] for r in longer[:40]] == [
        r["text"] for r in compose(kind="exercises", samples=40, seed=9)
    ]
    assert longer[0]["text"] != compose(kind="exercises", samples=1, seed=10)[0]["text"]


GOLDEN = [
    "5fb1004fe6cbcd48e9e3291cfca4d32bf95e94109685315064fc9fca3b75f516",
    "331269577fac1b92f974e6374938a695cfe487f0ecbf5c0d6c9dddbd25705a4d",
    "90618e6047853421a58ea748ce6261fa4e8a85a69e00422733a5255d549a6b72",
]


def verb(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main(["data", *map(str, words), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_records_are_equal_for_any_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.small_programs.stage.SHARD_SAMPLES", 20)
    order = ("compose", "--kind", "exercises", "--samples", "90", "--world", "figure")
    one = verb(capsys, *order, "--out", tmp_path / "one", "--workers", "1")
    three = verb(capsys, *order, "--out", tmp_path / "three", "--workers", "3")
    assert one["records_out"] == 90
    assert one["records_sha256"] == three["records_sha256"]
    assert len({row["id"] for row in read(tmp_path / "one")}) == 90
    assert verb(capsys, *order, "--out", tmp_path / "one")["reused"]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["data", *order, "--seed", "3", "--out", str(tmp_path / "one")]))
    assert stopped.value.code == 2


def test_suites_in_humanevals_form_score_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.jsonl"
    order = ("compose", "--kind", "suite", "--samples", "60", "--out", suite)
    assert verb(capsys, *order)["problems"] == 60
    assert verb(capsys, *order)["reused"]
    rows = [json.loads(line) for line in suite.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 60
    assert {"depth-1", "held-out-depth-2", "held-out-depth-4", "held-out-phrasing",
            "textbook-only"} <= {row["group"] for row in rows}  # fmt: skip
    arguments = ["evaluate", "--suite", str(suite), "--out", str(tmp_path / "score"), "--json"]
    assert main([*arguments, "--canonical"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["statuses"] == {"passed": 60}


def test_suites_tell_a_function_from_its_neighbours() -> None:
    by_name = all_primitives()
    caught = tried = 0
    for row in make_suite(ComposeOptions(kind="suite", samples=60, world="figure")):
        steps = [by_name[name] for name in row["composition"]]
        space: dict[str, Any] = {}
        exec(row["test"], space)
        space["check"](lambda value, steps=steps: run(steps, value))
        for neighbour in neighbours(steps):
            tried += 1
            try:
                space["check"](lambda value, steps=neighbour: run(steps, value))
            except Exception:  # too wide, or another value
                caught += 1
    assert tried > 200
    assert caught > 0.97 * tried


def neighbours(steps: list[Primitive]) -> list[list[Primitive]]:
    last = steps[-1]
    world = list(all_primitives().values())[:80]
    return [
        [*steps[:-1], other]
        for other in world
        if (other.takes, other.gives) == (last.takes, last.gives) and other is not last
    ]


def test_decontaminate_finds_a_planted_leak_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rapidfuzz")
    suite = tmp_path / "suite.jsonl"
    world = ("compose", "--world", "figure")
    verb(capsys, *world, "--kind", "suite", "--samples", "100", "--out", suite)
    for kind in ("exercises", "textbooks"):
        out = tmp_path / kind
        verb(capsys, *world, "--kind", kind, "--samples", "1000", "--out", out, "--workers", "1")
    # Word runs of 13 and skeletons recur in a small world by design; 30 words span a statement.
    order = ("decontaminate", "--against", suite, "--no-ast", "--ngram", "30", "--workers", "1")
    both = (tmp_path / "exercises", tmp_path / "textbooks")
    clean = verb(capsys, *order[:1], *both, *order[1:], "--out", tmp_path / "clean")
    assert clean["records_in"] == clean["records_out"] == 2000
    row = json.loads(suite.read_text().splitlines()[1])
    leak = tmp_path / "leak.jsonl"
    leak.write_text(json.dumps({"text": row["prompt"] + row["canonical_solution"]}) + "\n")
    verb(capsys, "ingest", leak, "--out", tmp_path / "planted")
    planted = verb(
        capsys, *order[:1], both[0], tmp_path / "planted", *order[1:], "--out", tmp_path / "found"
    )
    assert planted["records_in"] - planted["records_out"] == 1
    assert row["task_id"] in read(tmp_path / "found", "rejected")[0]["detail"]


def attempt(given: dict[str, Any]) -> None:
    options = ComposeOptions(**given)
    if options.kind == "suite":
        list(make_suite(options))
    else:
        plan_compose(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 9}, "depth` 9"),
        ({"wrong": 2}, "wrong` 2"),
        ({"samples": 0}, "samples` 0"),
        ({"primitives": 100_000}, "primitives` 100000"),
        ({"kind": "suite", "wrong": 0.5}, "wrong`: has no effect"),
        ({"groups": ("depth-1",)}, "groups`: has no effect"),
        ({"kind": "suite", "world": "quickstart", "groups": ("textbook-only",)}, "textbook-only"),
        ({"kind": "suite", "world": "quickstart", "groups": ("depth-4",)}, "deeper"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"kind": "exercises", "samples": 5, **options}
    with pytest.raises(ValueError, match=message) as refused:
        attempt(given)
    assert "\n" not in str(refused.value)


def test_a_recipe_composes_records_and_a_suite(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"work: {tmp_path / 'out'}\nstages:\n"
        "  exercises: {verb: compose, kind: exercises, samples: 20, world: quickstart}\n"
        "  suite: {verb: compose, kind: suite, samples: 4, world: quickstart, out: suite.jsonl,\n"
        "          groups: [depth-1, held-out-depth-2]}\n"
    )
    assert main(["data", "run", str(recipe), "--workers", "2"]) == 0
    assert len(read(tmp_path / "out" / "exercises")) == 20
    rows = [json.loads(line) for line in (tmp_path / "out" / "suite.jsonl").open()]
    assert [row["group"] for row in rows] == ["depth-1", "held-out-depth-2"] * 2
