"""Programming contests, and large files that are divided: the same records however they are cut."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ingest import rows
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.records.jsonl import read_lines
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, run_stage
from tests.data_pipeline.record_files import read

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402


def ingest(path: Path, out: Path, workers: int = 1, **options: Any) -> Manifest:
    stage, work = plan_ingest([str(path)], IngestOptions(**options))
    return run_stage(stage, work, out, Options(workers=workers, max_reject=1))[0]


# The columns of deepmind/code_contests as `datasets` writes them: a sequence of structs is a
# struct of lists, class labels are integers.
_CASES = pyarrow.struct([(n, pyarrow.list_(pyarrow.string())) for n in ("input", "output")])
_SOLUTIONS = pyarrow.struct(
    [
        ("language", pyarrow.list_(pyarrow.int64())),
        ("solution", pyarrow.list_(pyarrow.string())),
    ]
)
CONTEST_SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("description", pyarrow.string()),
        ("public_tests", _CASES),
        ("private_tests", _CASES),
        ("generated_tests", _CASES),
        ("source", pyarrow.int64()),
        ("difficulty", pyarrow.int64()),
        ("solutions", _SOLUTIONS),
        ("incorrect_solutions", _SOLUTIONS),
        ("cf_contest_id", pyarrow.int64()),
        ("cf_index", pyarrow.string()),
        ("cf_points", pyarrow.float32()),
        ("cf_rating", pyarrow.int32()),
        ("cf_tags", pyarrow.list_(pyarrow.string())),
        ("time_limit", pyarrow.struct([("seconds", pyarrow.int64()), ("nanos", pyarrow.int64())])),
    ]
)


def problem(name: str, solutions: list[tuple[int, str]], **more: Any) -> dict[str, Any]:
    languages, texts = [s[0] for s in solutions], [s[1] for s in solutions]
    row = {
        "name": name,
        "description": f"Solve {name}.\n",
        "public_tests": {"input": ["1"], "output": ["SECRET TEST"]},
        "source": 2,
        "difficulty": 7,
        "solutions": {"language": languages, "solution": texts},
        "incorrect_solutions": {"language": [3], "solution": ["WRONG"]},
        "cf_contest_id": 1575,
        "cf_index": "A",
        "cf_tags": ["data structures"],
    }
    return {**row, **more}


PROBLEMS = [
    problem(
        "1575_A. Sorting",
        [
            *((2, "int main(){}"), (3, "print(1)\r\n"), (1, "print 1"), (3, "print(1)\r\n")),
            *((3, "a" * 70_000), (3, "print('```')"), (3, "print(3)"), (3, "print(4)")),
        ],
    ),
    problem("p00001 Hills", [(3, "x = 5")], source=6, cf_contest_id=0, cf_index="", cf_tags=None),
    problem("only_cpp", [(2, "int main(){}"), (1, "print 1")]),
    problem("none", []),
    problem("silent", [(3, "x = 1")], description=" "),
    problem("nameless", [(3, "x = 1")], description=None),
]


def test_contests_become_one_document_a_problem(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(PROBLEMS, schema=CONTEST_SCHEMA)
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    manifest = ingest(tmp_path / "train.parquet", tmp_path / "out", max_solutions=3)
    first, second = read(tmp_path / "out")
    assert first["text"] == (
        "# 1575_A. Sorting\n\nSolve 1575_A. Sorting.\n"
        "\n## Solution\n\n```python\nprint(1)\n```\n"
        "\n## Solution\n\n````python\nprint('```')\n````\n"
        "\n## Solution\n\n```python\nprint(3)\n```\n"
    )
    assert first["url"] == "https://codeforces.com/problemset/problem/1575/A"
    assert (first["source"], first["license"]) == ("code_contests", "CC-BY-4.0")
    assert first["meta"] == {
        "name": "1575_A. Sorting",
        "solutions": 3,
        "difficulty": 7,
        "cf_tags": ["data structures"],
        "contest_site": "codeforces",
    }
    assert "url" not in second
    assert second["meta"]["contest_site"] == "aizu"
    assert manifest.rejected == {"empty": 1, "missing_field": 1, "no_solution": 2}
    # as JSON lines, in either shape that is in use, and asked for by name
    lines = [json.dumps(row) for row in PROBLEMS[:1]]
    pairs = PROBLEMS[1]["solutions"]
    both = zip(pairs["language"], pairs["solution"], strict=True)
    as_list = [{"language": number, "solution": text} for number, text in both]
    lines.append(json.dumps({**PROBLEMS[1], "solutions": as_list}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    ingest(tmp_path / "train.jsonl", tmp_path / "lines", format="code-contests")
    assert [r["text"] for r in read(tmp_path / "lines")] == [first["text"], second["text"]]


@pytest.mark.parametrize("wanted", ["stack", "code-contests", "stackoverflow"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, wanted: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl: `format` {wanted}"):
        ingest(tmp_path / "rows.jsonl", tmp_path / "out", format=wanted)


def test_the_stack_has_its_label(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"content": "x", "max_stars_repo_name": "a/b"}\n')
    for wanted, label in (("auto", "local"), ("stack", "stack")):
        ingest(tmp_path / "rows.jsonl", tmp_path / wanted, format=wanted)
        assert read(tmp_path / wanted)[0]["source"] == label


LINES = [
    *(b'{"text": "first"}', b"", b'{"text": "two \xe2\x80\xa8 in one"}', b"not json", b"  "),
    *(b'{"text": "%s"}' % (b"long " * 40), b'{"text": "x"}', b'{"text": "last, no line feed"}'),
]


@pytest.mark.parametrize("split", [1, 2, 7, 64, 1000])
def test_lines_are_the_same_however_a_file_is_cut(tmp_path: Path, split: int) -> None:
    import io

    data = b"\n".join(LINES)
    whole = list(read_lines(io.BytesIO(data)))
    assert len(whole) == 6
    cuts = [*range(0, len(data), split), len(data)]
    pieces = [
        line
        for start, stop in itertools.pairwise(cuts)
        for line in read_lines(io.BytesIO(data), start, stop)
    ]
    assert pieces == whole


def test_large_files_are_divided_and_give_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"value = {n}\n" + "# filler\n" * (n % 40) for n in range(300)]
    lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "rows.jsonl").write_text(lines)
    table = pyarrow.table({"text": texts, "n": range(300)})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=16, compression="none")

    def outcome(name: str, out: str, workers: int = 1) -> tuple[Manifest, list[Any]]:
        manifest = ingest(tmp_path / name, tmp_path / out, workers, source="s", limit=None)
        return manifest, [(r["id"], r["text"], r["meta"]) for r in read(tmp_path / out)]

    for name in ("rows.jsonl", "rows.parquet"):
        monkeypatch.setattr(rows, "SPLIT_BYTES", 2**28)
        whole, expected = outcome(name, f"{name}-whole")
        assert [meta["n"] for _, _, meta in expected] == list(range(300))
        assert len(whole.parts) == 1
        monkeypatch.setattr(rows, "SPLIT_BYTES", 10_000)
        one, divided = outcome(name, f"{name}-one")
        assert divided == expected
        assert len(one.parts) > 3
        many, _ = outcome(name, f"{name}-many", workers=3)
        assert many.parts == one.parts
        assert one.inputs[0]["sha256"] == whole.inputs[0]["sha256"]
        assert one.inputs[0]["bytes"] == (tmp_path / name).stat().st_size
