"""The corpus report: a doubled corpus shows, measures against brute force, a page that is safe."""

import ast
import base64
import hashlib
import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.report.build import Corpus, build_report
from data_pipeline.report.measures import evenness, size_label
from data_pipeline.report.scan import coverage_cell, sample_rate
from tests.data_pipeline.record_files import read, write_records
from tests.data_pipeline.test_pipeline_crash import drive
from tools import cli

WORDS = [a + b for a in ("get", "sum", "old", "red", "map", "cut") for b in "abcdefghijkl"]


def program(draw: random.Random) -> str:
    """A module of one function that parses; its shape and words vary."""
    name = f"{draw.choice(WORDS)}_{draw.randrange(10**4)}"
    lines = [f"import {draw.choice(['os', 're', 'math'])}", "", f"def {name}(values):"]
    for _ in range(draw.randrange(6, 16)):
        a, b, c = draw.sample(WORDS, 3)
        lines.append(
            draw.choice(
                [
                    f"    {a} = {b} + {draw.randrange(999)} * {c}",
                    f"    if {a} > {b}: {c}({a}, {b})",
                    f"    for {a} in {b}: print({c}.{a})",
                    f"    {a} = [{b} for {b} in {c} if {b}]",
                    f"    # {a} {b} {c} {draw.randrange(10**6)}",
                ]
            )
        )
    return "\n".join([*lines, f"    return {draw.choice(WORDS)}", ""])


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "text": program(draw),
            "license": draw.choice(["MIT", "Apache-2.0"]),
            "topic": draw.choice(["sets", "trees"]),
            "audience": draw.choice(["children", "teachers"]),
            "difficulty": "easy",
        }
        for _ in range(count)
    ]


def report_of(*corpora: Path, out: Path, workers: int = 1) -> list[dict[str, Any]]:
    labels = ["before", "after"]
    given = [Corpus(label, [path]) for label, path in zip(labels, corpora, strict=False)]
    made, _ = build_report(given, out, workers=workers, examples=20)
    found: list[dict[str, Any]] = made["corpora"]
    return found


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A corpus, the same with every document twice, and their report."""
    root = tmp_path_factory.mktemp("report")
    rows = rows_of(400)
    once = write_records(root, [rows[:200], rows[200:]], "once")
    twice = write_records(root, [rows[:200], rows[200:], rows], "twice")
    return root, report_of(once, twice, out=root / "out")


def test_every_measure_sees_a_doubled_corpus(doubled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (once, twice) = doubled
    assert (once["documents"], twice["documents"]) == (400, 800)
    assert twice["bytes"] == 2 * once["bytes"]
    ratio = twice["compression"]["ratio"] / once["compression"]["ratio"]
    assert ratio == pytest.approx(2, rel=0.05)
    assert once["ngrams"]["mean_share"] < 0.05
    assert twice["ngrams"]["mean_share"] == 1
    for before, after in zip(once["near_duplicates"], twice["near_duplicates"], strict=True):
        assert before["jaccard"] == after["jaccard"]
        assert before["clusters"] == after["clusters"] == before["cluster_sizes"]["1"]
        assert (before["redundant_share"], after["redundant_share"]) == (0, 0.5)
        assert after["cluster_sizes"] == {"2": 400}
    for name in ("documents", "functions"):
        first, second = once["skeletons"][name], twice["skeletons"][name]
        assert second["distinct"] == first["distinct"] > 200
        assert second["unique_share"] == pytest.approx(first["unique_share"] / 2, abs=1e-4)
    assert all(p["new_per_1000"] == 1000 for p in once["growth"]["points"])
    growth = [p["new_per_1000"] for p in twice["growth"]["points"]]
    assert growth == [1000] * 5 + [0] * 5
    assert {example["cluster_size"] for example in twice["examples"]} == {2}


def test_measures_are_those_of_brute_force(tmp_path: Path) -> None:
    rows = rows_of(60, seed=3)
    draw = random.Random(5)
    for row in rows[:20]:  # with pieces of one another
        row["text"] += "# " + "\n# ".join(draw.choice(rows)["text"].split("\n")[3:9]) + "\n"
    rows += [{"text": "one two three"}, {"text": "def broken(:\n    pass\n"}]
    records = write_records(tmp_path, [rows[:31], rows[31:]])
    (found,) = report_of(records, out=tmp_path / "out")
    texts = [record["text"] for record in read(records)]

    grams = []
    for text in texts:
        words = re.findall(r"[a-z0-9_]+", text.lower())
        grams.append({tuple(words[i : i + 10]) for i in range(len(words) - 9)})
    holders = Counter(gram for own in grams for gram in own)
    shares = [sum(holders[g] > 1 for g in own) / len(own) for own in grams if own]
    assert found["ngrams"]["mean_share"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
    assert found["ngrams"]["documents"] == len(shares) == 60
    assert sum(found["ngrams"]["histogram"]) == 60
    assert 0.02 < found["ngrams"]["mean_share"] < 0.9

    trees = []
    for text in texts:
        try:
            trees.append(ast.parse(text))
        except SyntaxError:
            continue
    assert found["skeletons"]["unparsed"] == len(texts) - len(trees) == 2
    names = Counter(n.name for t in trees for n in ast.walk(t) if isinstance(n, ast.FunctionDef))
    assert found["names"]["total"] == sum(names.values()) == 60
    assert found["names"]["distinct"] == len(names)
    imports = Counter(t.body[0].names[0].name for t in trees)
    assert dict(found["imports"]["top"]) == dict(imports)
    sizes = sorted(len(text.encode()) for text in texts)
    assert found["bytes"] == sum(sizes)
    assert found["lengths"]["quantiles"]["0"] == sizes[0]
    assert found["lengths"]["quantiles"]["100"] == sizes[-1]
    assert sum(found["lengths"]["histogram"].values()) == 62
    licenses = Counter(record.get("license", "") for record in read(records))
    assert dict(found["licenses"]["top"]) == dict(licenses)
    cells = Counter((r["topic"], r["audience"], r["difficulty"]) for r in rows[:60])
    told = {tuple(c["cell"]): c["documents"] for c in found["coverage"]["largest"]}
    assert told == dict(cells)
    expected = -sum(n / 60 * math.log2(n / 60) for n in cells.values())
    assert found["coverage"]["entropy"]["bits"] == pytest.approx(expected, abs=1e-3)


def test_same_skeleton_is_the_same_exercise(tmp_path: Path) -> None:
    shape = (
        'def {f}({x}):\n    """{d}"""\n    for {y} in {x}:\n'
        "        print({y} + {n} + {y} + {y})\n    return {x}\n"
    )
    words = [
        dict(zip("fxydn", (f"f{n}", f"x{n}", f"y{n}", f"Doc {n}.", n), strict=True))
        for n in range(9)
    ]
    rows = [{"text": shape.format(**each)} for each in words]
    rows.append({"text": rows[0]["text"].replace("+", "*", 1)})
    records = write_records(tmp_path, [rows])
    (found,) = report_of(records, out=tmp_path / "out")
    assert found["skeletons"]["documents"]["distinct"] == 2
    assert found["skeletons"]["functions"]["most_repeated"] == 9


def test_coverage_counts_empty_cells(tmp_path: Path) -> None:
    rows = [
        {"text": program(random.Random(n)), "topic": topic, "audience": audience}
        for n, (topic, audience) in enumerate([("a", "x"), ("a", "x"), ("b", "y"), ("c", "y")])
    ]
    (found,) = report_of(write_records(tmp_path, [rows]), out=tmp_path / "out")
    coverage = found["coverage"]
    assert (coverage["cells"], coverage["empty_cells"]) == (6, 3)
    assert coverage["some_empty"] == [["a", "y", ""], ["b", "x", ""], ["c", "x", ""]]
    assert coverage["entropy"] == {"bits": 1.5, "of_even": round(1.5 / math.log2(3), 4)}
    assert coverage["axes"]["topic"]["counts"] == {"a": 2, "b": 1, "c": 1}


def test_where_coverage_is_read_from() -> None:
    record: Any = {"id": "1", "text": "", "source": "exercise"}
    assert coverage_cell(record) is None
    plan = {"topic": "sets", "profession": "cook", "difficulty": "hard", "name": "f"}
    assert coverage_cell(record | {"gen": {"plan": plan}}) == ("sets", "cook", "hard")
    assert coverage_cell(record | {"meta": {"topic": "x", "audience": 3}}) == ("x", "", "")
    assert coverage_cell(record | {"gen": 3, "meta": {"a": 1}}) is None


def test_classes_and_rates() -> None:
    assert [size_label(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [
        *("1", "2", "3-4", "3-4", "5-8", "5-8", "9-16", "9-16", "17-32")
    ]
    assert evenness([5, 5, 5, 5]) == {"bits": 2, "of_even": 1}
    assert evenness([7]) == {"bits": 0, "of_even": 1}
    assert (sample_rate(1000, 10**6), sample_rate(10**9, 10**6)) == (1, 200)


HOSTILE = "</pre><script>fetch('https://evil.example/')</script><img src=x onerror=alert(1)>"


class _Page(HTMLParser):
    """Tags with their attributes, and the texts in elements by their tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._current = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._current = tag

    def handle_endtag(self, tag: str) -> None:
        self._current = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._current, []).append(data)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = rows_of(8)
    for number, row in enumerate(rows):
        row["text"] = f"# {number} {HOSTILE}\n" + row["text"]
        row |= {"license": HOSTILE, "topic": HOSTILE, "path": HOSTILE, "repo": HOSTILE}
    records = write_records(tmp_path, [rows])
    report_of(records, records, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    kinds = Counter(tag for tag, _ in page.tags)
    assert kinds["script"] == kinds["style"] == 1
    assert kinds["img"] == kinds["link"] == kinds["iframe"] == 0
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    assert any(HOSTILE in data for data in page.texts["pre"])
    assert kinds["details"] == 16
    assert kinds["svg"] == 4
    # The policy admits this script alone, and nothing is loaded from anywhere.
    (script,) = page.texts["script"]
    digest = hashlib.sha256(script.encode()).digest()
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "url(" not in "".join(page.texts["style"])


def test_nothing_depends_on_the_number_of_workers(
    doubled: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    root, _ = doubled
    report_of(root / "once", root / "twice", out=tmp_path / "out", workers=2)
    for name in ("report.json", "report.html", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "out" / name).read_bytes()


def test_command_line(
    doubled: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _ = doubled
    argv = ["data", "report", str(root / "twice"), "--before", str(root / "once"), "--json"]
    argv += ["--examples", "20", "--workers", "1", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["near_duplicate_share"] for c in told["corpora"]] == [0, 0.5]
    assert (tmp_path / "out" / "report.html").read_bytes() == (
        root / "out" / "report.html"
    ).read_bytes()
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["reused"]
    argv[argv.index("20")] = "30"
    assert cli.main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite"]) == 0
    argv[2] = str(tmp_path / "absent")
    assert cli.main(argv) == 2


def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    records = write_records(tmp_path, [rows_of(3, 1), rows_of(3, 2)])
    argv = ["data", "report", str(records), "--out", str(tmp_path / "out"), "--workers", "1"]
    report = drive(tmp_path, "out", "out/manifest.json", argv)
    assert report["killed"] >= 1
    assert "out/report.html" in str(report["files"])
