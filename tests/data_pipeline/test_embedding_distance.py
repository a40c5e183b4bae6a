"""Distances of embeddings against a calculation pair by pair, and the stage around them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from data_pipeline.decontaminate import embedding_distance
from data_pipeline.decontaminate.benchmarks import Fields, Problem, load_benchmarks
from data_pipeline.decontaminate.embedding_distance import (
    EmbeddingTable,
    embedding_spec,
    problem_text,
)
from data_pipeline.quality.features import BUCKETS, open_features
from tests.data_pipeline.record_files import read, write_records
from tests.data_pipeline.test_decontaminate import (
    CLEAN,
    EDITED,
    QUOTED,
    RENAMED,
    SHORT,
    write_benchmarks,
)
from tools.cli import main


def problems_of(texts: Sequence[str]) -> list[Problem]:
    return [Problem("made", str(number), (), (text,), "") for number, text in enumerate(texts)]


def brute(
    texts: Sequence[Any], problems: Sequence[Any], threshold: float
) -> list[dict[int, float]]:
    """One pair at a time, in float64, by the definition of the distance."""
    found = []
    for a in texts:
        near = {}
        for number, b in enumerate(problems):
            if not a.any() or not b.any():
                continue
            wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
            unit_a = wide_a / np.sqrt((wide_a**2).sum())
            unit_b = wide_b / np.sqrt((wide_b**2).sum())
            distance = np.sqrt(((unit_a - unit_b) ** 2).sum())
            if distance <= threshold:
                near[number] = float(distance)
        found.append(near)
    return found


def test_distances_are_those_of_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng()  # other vectors each time
    vectors = generator.normal(size=(300, 16)).astype(np.float32) + 2
    vectors[5] = 0
    vectors[40] = 0
    vectors[299] = vectors[3]
    names = [str(number) for number in range(300)]
    monkeypatch.setattr(embedding_distance, "BATCH_DOCUMENTS", 64)
    monkeypatch.setattr(
        embedding_distance,
        "open_features",
        lambda spec: lambda texts: vectors[[int(text) for text in texts]],
    )
    table = EmbeddingTable(problems_of(names[:30]), {"kind": "huggingface"})
    expected = brute(vectors[30:], vectors[:30], 0.6)
    found = table.near(names[30:], 0.6)
    assert [set(near) for near in found] == [set(near) for near in expected]
    assert 100 < sum(map(len, found)) < 270 * 30 - 1000, "the threshold divides the pairs"
    for near, right in zip(found, expected, strict=True):
        for number, distance in near.items():
            assert distance == pytest.approx(right[number], abs=1e-7)
    assert found[10] == {}, "no embedding"
    assert found[269][3] == pytest.approx(0, abs=1e-7)
    assert not any(5 in near for near in found)
    assert table.near([], 1.0) == []


def test_hashed_tokens_and_not_the_signals_of_form() -> None:
    texts = [RENAMED, EDITED, QUOTED, CLEAN, "", RENAMED + "\n" * 3]
    spec = embedding_spec("hashed", 1)
    table = EmbeddingTable(problems_of(texts[:3]), spec)
    features = open_features(spec)(texts)[:, :BUCKETS]
    expected = brute(features, features[:3], 1.0)
    found = table.near(texts, 1.0)
    assert [set(near) for near in found] == [set(near) for near in expected]
    assert found[0][0] < 1e-7
    assert 0 < found[1][0] < 0.6
    assert found[4] == {}
    assert found[5] == pytest.approx(found[0]), "blank lines change nothing"


def test_what_stands_for_a_problem(tmp_path: Path) -> None:
    human, basic = write_benchmarks(tmp_path)
    first = problem_text(load_benchmarks([human], Fields())[0])
    assert first.startswith("def running_peak")
    assert first.count("largest number seen") == 1
    assert "check(candidate)" not in first
    other = problem_text(load_benchmarks([basic], Fields())[0])
    assert other.startswith("Write a function to count")
    assert "def count_vowels" in other
    assert "an ape" not in other


def run(
    records: Path, out: Path, benchmarks: list[Path], *more: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    arguments = ["data", "decontaminate", str(records), "--out", str(out), "--ngram", "0"]
    arguments += ["--no-ast", "--json", "--against", *map(str, benchmarks), *more]
    assert main([*arguments, "--max-reject", "1"]) == 0
    return json.loads((out / "report.json").read_text()), read(out, "rejected")


def test_the_stage_reports_hits_and_takes_them_out(tmp_path: Path) -> None:
    benchmarks = write_benchmarks(tmp_path)
    problems = load_benchmarks(benchmarks, Fields())
    texts = [problem_text(problems[0]), RENAMED, EDITED, QUOTED, SHORT, CLEAN]
    rows = [{"text": text, "id": str(number)} for number, text in enumerate(texts)]
    records = write_records(tmp_path, [rows[:3], rows[3:]])
    spec = embedding_spec("hashed", 1)
    features = open_features(spec)
    kept = [record["text"] for record in read(records)]
    expected = brute(
        features(kept)[:, :BUCKETS], features([problem_text(p) for p in problems])[:, :BUCKETS], 0.8
    )
    assert 0 < sum(map(bool, expected)) < len(kept)
    more = ("--embedding-model", "hashed", "--embedding-distance", "0.8")
    found = []
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        report, rejects = run(records, out, benchmarks, *more, "--workers", workers)
        found.append((report, rejects, [record["text"] for record in read(out)]))
    assert found[0] == found[1]
    assert found[0][2] == [text for text, near in zip(kept, expected, strict=True) if not near]
    assert {reject["reason"] for reject in rejects} == {"embedding"}
    for number, problem in enumerate(problems):
        near = [distances[number] for distances in expected if number in distances]
        rows_of = report["benchmarks"][problem.benchmark]["embedding"]
        mine = [row for row in rows_of if row["task_id"] == problem.task_id]
        assert len(mine) == bool(near)
        for row in mine:
            assert row["documents"] == len(near)
            assert row["distance"] == pytest.approx(min(near), abs=1e-7)
    text = (out / "report.txt").read_text()
    assert "within 0.8 of a document's embedding" in text


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks = write_benchmarks(tmp_path)
    records = write_records(tmp_path, [[{"text": CLEAN, "id": "1"}]])
    arguments = ["data", "decontaminate", str(records), "--out", str(tmp_path / "out")]
    arguments += ["--against", str(benchmarks[0])]
    for more, said in (
        (["--embedding-model", "hashed"], "belong together"),
        (["--embedding-distance", "0.1"], "belong together"),
        (["--embedding-model", "hashed", "--embedding-distance", "3"], "0 to 2 apart"),
    ):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err
