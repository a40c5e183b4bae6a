"""Licences, opt-outs and provenance: what must not be used is not, and all else can be traced."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ingest.licenses import PERMISSIVE, FilterFiles, is_allowed, load_filters
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, run_stage
from data_pipeline.tokens.merge_tokens import merge_tokens
from data_pipeline.tokens.tokenize_records import documents_path, tokenize_records
from data_pipeline.tokens.trace import Query, Searched, trace
from megaphi.data.indexed import IndexedDataset
from megaphi.errors import RunError
from tests.data_pipeline.record_files import read
from tools.data.command import main

ALLOWED = frozenset({"mit", "apache-2.0", "bsd-3-clause"})


def ingest(path: Path, out: Path, workers: int = 1, **options: Any) -> Manifest:
    stage, work = plan_ingest([str(path)], IngestOptions(**options))
    return run_stage(stage, work, out, Options(workers=workers, max_reject=1))[0]


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("", False),
        ("MIT AND Apache-2.0", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only or mit", True),
        ("MIT OR GPL-2.0-only AND LGPL-2.1-only", True),
        ("(MIT OR GPL-2.0-only) AND LGPL-2.1-only", False),
        ("(GPL-2.0-only OR (MIT)) AND BSD-3-Clause", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", True),
        ("MIT License", False),
        ("MIT/Apache-2.0", False),
        ("MIT,", False),
        ("MIT OR", False),
        ("OR MIT", False),
        ("(MIT", False),
        ("MIT)", False),
        ("()", False),
        ("MIT WITH", False),
        ("LicenseRef-Proprietary", False),
        ("(" * 1000 + "MIT" + ")" * 1000, False),
        ("MIT OR " * 2000 + "MIT", False),
    ],
)
def test_license_expressions(expression: str, allowed: bool) -> None:
    assert is_allowed(expression, ALLOWED) is allowed


def test_the_shipped_list() -> None:
    shipped = load_filters(FilterFiles(PERMISSIVE)).licenses
    assert shipped is not None
    assert {"mit", "apache-2.0", "bsd-2-clause", "isc", "unlicense", "0bsd", "zlib"} <= shipped
    copyleft = (
        "gpl",
        "lgpl",
        "agpl",
        "mpl-",
        "epl-",
        "eupl",
        "cddl",
        "osl",
        "cc-by-sa",
        "cc-by-nc",
    )
    assert not [name for name in shipped if name.startswith(copyleft)]
    assert len(shipped) > 190


def stack_row(number: int, **more: Any) -> dict[str, Any]:
    """A row with the columns of bigcode/the-stack-dedup that matter."""
    row = {
        "hexsha": f"{number:040x}",
        "content": f"value_{number} = {number}\n",
        "lang": "Python",
        "max_stars_repo_path": f"src/m{number}.py",
        "max_stars_repo_name": f"owner{number}/project",
        "max_stars_repo_head_hexsha": f"{number + 1:040x}",
        "max_stars_repo_licenses": ["MIT"],
        "max_stars_count": 3,
        "max_issues_repo_name": f"owner{number}/project",
        "max_forks_repo_name": None,
    }
    return {**row, **more}


ROWS = [
    stack_row(0),
    stack_row(1, max_stars_repo_licenses=["Apache-2.0", "MIT"]),
    stack_row(2, max_stars_repo_licenses=["MIT", "GPL-3.0-only"]),
    stack_row(3, max_stars_repo_licenses=["MIT OR GPL-3.0-only", "ISC"]),
    stack_row(4, max_stars_repo_licenses=[]),
    stack_row(5, max_stars_repo_licenses=None),
    stack_row(6, max_stars_repo_name="Gone/Away"),
    stack_row(7, max_stars_repo_name="gone/stays"),
    stack_row(8, max_stars_repo_name="All/Of-It"),
    stack_row(9, max_forks_repo_name="GONE/away"),
    stack_row(10, max_stars_repo_licenses=["mit"]),
]


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "data" / "train-00000.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=4)
    (tmp_path / "optout.txt").write_text("# removal requests\nGone/Away\n\nall/  # an owner\n")
    return path


def test_the_stack_with_licences_and_opt_outs(stack: Path, tmp_path: Path) -> None:
    optout = str(tmp_path / "optout.txt")
    filters = FilterFiles(PERMISSIVE, optout)
    manifest = ingest(stack, tmp_path / "out", format="stack", filters=filters)
    records = read(tmp_path / "out")
    assert [record["text"].split()[0] for record in records] == [
        *("value_0", "value_1", "value_3", "value_7", "value_10")
    ]
    assert records[1]["license"] == "Apache-2.0 AND MIT"
    assert records[2]["license"] == "(MIT OR GPL-3.0-only) AND ISC"
    assert records[0]["source"] == "stack"
    assert records[0]["revision"] == f"{1:040x}"
    assert manifest.rejected == {"license": 3, "opted_out": 3}
    rejected = read(tmp_path / "out", "rejected")
    assert [r["detail"] for r in rejected] == [
        "MIT AND GPL-3.0-only",
        *["no licence is known"] * 2,
        *("Gone/Away", "All/Of-It", "GONE/away"),
    ]
    # the lists count by their content: another name is the same, another line is not
    (tmp_path / "same.txt").write_text("all/\ngone/away\n")
    same = FilterFiles(PERMISSIVE, str(tmp_path / "same.txt"))
    assert ingest(stack, tmp_path / "same", format="stack", filters=same).key == manifest.key
    (tmp_path / "same.txt").write_text("all/\n")
    load_filters.cache_clear()
    assert ingest(stack, tmp_path / "other", format="stack", filters=same).key != manifest.key


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("licenses", "MIT\nGPL 3\n", r"list:2: 'GPL 3'"),
        ("licenses", "# none\n", "names no licence"),
        ("opt_out", "a/b\nhttps://github.com/a/b\n", "list:2"),
        ("opt_out", "justaname\n", "OWNER/NAME"),
    ],
)
def test_bad_lists_are_named(
    stack: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match=message):
        ingest(stack, tmp_path / "out", filters=FilterFiles(**{name: str(tmp_path / "list")}))
    with pytest.raises(FileNotFoundError):
        ingest(stack, tmp_path / "out", filters=FilterFiles(**{name: str(tmp_path / "absent")}))


def test_documents_are_traced_from_records_to_tokens(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(stack, tmp_path / "records", format="stack")
    made = [tmp_path / "a", tmp_path / "b"]
    for seed, prefix in enumerate(made):
        tokenize_records(tmp_path / "records", "codegen", prefix, shuffle_seed=seed)
    merge_tokens(made, tmp_path / "both")
    lines = [json.loads(li) for li in documents_path(tmp_path / "both").read_text().splitlines()]
    assert all(line["revision"] for line in lines)
    tokens = IndexedDataset(tmp_path / "both")
    expected = read(tmp_path / "records")
    by_id = {record["id"]: record for record in expected}
    assert [line["id"] for line in lines] != [record["id"] for record in expected] * 2

    assert main(["trace", str(tmp_path / "both"), "--repo", "GONE/away", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["searched"], found["found"]) == (22, 2)
    from data_pipeline.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("codegen")
    stream = (tmp_path / "both.bin").read_bytes()
    for entry in found["documents"]:
        assert by_id[entry["id"]]["repo"] == "Gone/Away" == entry["repo"]
        ids = tokens[entry["index"]]
        span = stream[2 * entry["first_token"] : 2 * entry["end_token"]]
        assert span == ids.tobytes()
        assert tokenizer.decode(ids[:-1].tolist()) == by_id[entry["id"]]["text"]

    searched = Searched()
    rows = list(trace(tmp_path / "records", Query.of(["gone/"], [], []), searched))
    assert [(row["file"], row["line"], row["repo"]) for row in rows] == [
        ("part-00000.jsonl", 7, "Gone/Away"),
        ("part-00000.jsonl", 8, "gone/stays"),
        ("part-00000.jsonl", 10, "owner9/project"),  # whose fork is theirs
    ]
    gpl = list(trace(tmp_path / "a", Query.of([], [], ["gpl-3.0-ONLY"]), Searched()))
    assert len(gpl) == 2
    one = list(trace(tmp_path / "a", Query.of([], [expected[0]["id"]], []), Searched()))
    assert [row["path"] for row in one] == ["src/m0.py"]
    assert main(["trace", str(tmp_path / "a"), "--repo", "no/body"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 0 of 11 documents\n"


def test_trace_refuses_what_does_not_fit(stack: Path, tmp_path: Path) -> None:
    ingest(stack, tmp_path / "records", format="stack")
    tokenize_records(tmp_path / "records", "codegen", tmp_path / "a")
    table = documents_path(tmp_path / "a")
    whole = table.read_bytes()
    query = Query.of(["a/b"], [], [])
    for damaged in (whole[: whole.rindex(b"{")], whole + b'{"index":11}\n', whole[5:]):
        table.write_bytes(damaged)
        with pytest.raises(RunError, match=r"a\.documents\.jsonl"):
            list(trace(tmp_path / "a", query, Searched()))
    with pytest.raises(FileNotFoundError, match="records directory"):
        list(trace(tmp_path / "none", query, Searched()))
    with pytest.raises(ValueError, match="`repo`, `id` or `license`"):
        Query.of([], [], [])
