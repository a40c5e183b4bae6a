"""Ingest against hostile files: each ends in exactly one of kept and rejected, with its reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ingest import stage as ingest
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.runner.output import Manifest, read_manifest
from data_pipeline.runner.stage import Options, run_stage
from megaphi.errors import RunError, TooManyRejects
from megaphi.process_memory import peak_memory, reset_peak_memory

CODE = "def f(x):\n    return x\n"


def run(sources: list[Path | str], out: Path, workers: int = 1, **options: Any) -> Manifest:
    stage, work = plan_ingest([str(source) for source in sources], IngestOptions(**options))
    return run_stage(stage, work, out, Options(workers=workers, max_reject=1))[0]


def read(out: Path, kind: str = "part") -> list[dict[str, Any]]:
    """The lines of a records directory, read without the code under test."""
    files = sorted(out.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]


def hostile_tree(root: Path) -> dict[str, str]:
    """Write awkward files; returns each one's fate by name: `kept` or the reason of its reject."""
    root.mkdir()
    contents: dict[str, tuple[bytes, str]] = {
        "good.py": (CODE.encode(), "kept"),
        "bom.py": (b"\xef\xbb\xbf" + CODE.encode(), "kept"),
        "crlf.py": (CODE.replace("\n", "\r\n").encode(), "kept"),
        "separators.py": ("x = 'a\u2028b\x85c\x0cd'\n".encode(), "kept"),
        "zalgo.py": (("# Z" + "\u0335\u0300" * 500 + "\n").encode(), "kept"),
        "injection.py": (b"x = '<|endoftext|>'\n", "kept"),
        "latin1.py": ("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"), "kept"),
        "second_line.py": ("#!/bin/x\n# vim: fileencoding=cp1252\n'€'\n".encode("cp1252"), "kept"),
        "deep.py": (b"x = " + b"(" * 50_000 + b")" * 50_000 + b"\n", "long_word"),
        "unary.py": (b"x = " + b"- " * 400_000 + b"1\n", "kept"),
        "sum.py": (b"x = " + b" + ".join([b"1"] * 100_000) + b"\n", "kept"),
        "elif.py": (b"if a:\n    pass\n" + b"elif b:\n    pass\n" * 10_000, "kept"),
        "word.py": (b"x = '" + b"a" * 100_000 + b"'\n", "long_word"),
        "huge_word.py": (b"a" * 4 * 2**20, "too_large"),
        "nul.py": (b"x = 1\n\0\n", "nul"),
        "utf16.py": (CODE.encode("utf-16"), "utf8"),
        "late_cookie.py": ("x = 1\n# coding: latin-1\n'é'\n".encode("latin-1"), "utf8"),
        "overlong.py": (b"x = '\xc0\xaf'\n", "utf8"),
        "torn.py": ("x = 'é".encode()[:-1], "utf8"),
        "surrogate_bytes.py": (b"x = '\xed\xa0\x80'\n", "utf8"),
        "unknown_cookie.py": (b"# coding: uft-8\nx = 1\n", "encoding"),
        "rot13_cookie.py": (b"# coding: rot13\nk = 1\n", "encoding"),
        "punycode_cookie.py": (b"# coding: punycode\nx = 1\n", "encoding"),
        "wrong_cookie.py": ("# coding: ascii\nx = 'é'\n".encode(), "encoding"),
        "empty.py": (b"", "empty"),
        "blank.py": (b" \n\t\n", "empty"),
        "new\nline.py": (CODE.encode(), "kept"),
        "..dots..py": (CODE.encode(), "kept"),
    }
    for name, (data, _) in contents.items():
        (root / name).write_bytes(data)
    fates = {name: fate for name, (_, fate) in contents.items()}
    not_utf8 = os.fsencode(root) + b"/bad\xff.py"
    with open(not_utf8, "wb") as stream:
        stream.write(CODE.encode())
    fates["bad\\xff.py"] = "kept"
    (root / "folder").mkdir()
    (root / "folder" / "good.py").write_text(CODE)
    fates["folder/good.py"] = "kept"
    os.mkfifo(root / "pipe.py")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "self.py").symlink_to(root / "self.py")
    (root / "zero.py").symlink_to("/dev/zero")
    (root / "link.py").symlink_to(root / "good.py")
    fates |= dict.fromkeys(["pipe.py", "loop", "self.py", "zero.py", "link.py"], "not_regular_file")
    (root / "README.md").write_text("not Python, not an input")
    return fates


def test_every_file_is_kept_or_rejected_for_the_right_reason(tmp_path: Path) -> None:
    fates = hostile_tree(tmp_path / "tree")
    manifest = run([tmp_path / "tree"], tmp_path / "out")
    kept = [record["path"] for record in read(tmp_path / "out")]
    rejected = {
        reject["position"].removeprefix("tree/"): reject["reason"]
        for reject in read(tmp_path / "out", "rejected")
    }
    assert len(kept) == len(set(kept))
    assert dict.fromkeys(kept, "kept") | rejected == fates
    assert manifest.records_in == len(fates) == manifest.records_out + manifest.num_rejected
    assert manifest.records_out == len(kept)


def test_the_texts_are_what_python_would_read(tmp_path: Path) -> None:
    hostile_tree(tmp_path / "tree")
    run([tmp_path / "tree"], tmp_path / "out")
    texts = {record["path"]: record["text"] for record in read(tmp_path / "out")}
    assert texts["bom.py"] == texts["crlf.py"] == texts["good.py"] == CODE
    assert texts["latin1.py"].endswith("name = 'é'\n")
    assert texts["second_line.py"].endswith("'€'\n")
    assert texts["separators.py"] == "x = 'a\u2028b\x85c\x0cd'\n"


def test_the_output_does_not_depend_on_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "SHARD_BYTES", 3000)
    hostile_tree(tmp_path / "tree")
    one = run([tmp_path / "tree"], tmp_path / "one", workers=1)
    many = run([tmp_path / "tree"], tmp_path / "many", workers=3)
    assert len(one.parts) > 3
    assert (one.parts, one.rejects, one.key) == (many.parts, many.rejects, many.key)
    for part in one.parts:
        name = part.name
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


JSONL_LINES: list[tuple[bytes, str]] = [
    (json.dumps({"text": CODE}).encode(), "kept"),
    (json.dumps({"text": "a\u2028b\x85c", "n": 1}, ensure_ascii=False).encode(), "kept"),
    (b'{"text": "\\ud800 half"}', "surrogate"),
    (b'{"text": "fine", "other": "\\udfff"}', "surrogate"),
    (b'{"text": "\\ud83d\\ude42 a pair"}', "kept"),
    (b'{"text": "x", "n": NaN}', "kept"),
    (b'{"text": "a\\u0000b"}', "nul"),
    (b'{"text": "\xc0\xaf"}', "utf8"),
    (b'{"text": 3}', "type"),
    (b'{"text": null}', "type"),
    (b'["text"]', "type"),
    (b'{"content_": "x"}', "missing_field"),
    (b"{'text': 'python'}", "json"),
    (b'{"text": "x", "deep": ' + b"[" * 200 + b"]" * 200 + b"}", "json"),
    (b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "json"),
    (b'{"text": ""}', "empty"),
    (json.dumps({"text": "y " * 600_000}).encode(), "too_large"),
    (json.dumps({"text": "é" * 600_000}).encode(), "too_large"),
    (b'{"text": "torn', "json"),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_every_line_is_kept_or_rejected(tmp_path: Path, compressed: bool) -> None:
    import zstandard

    data = b"\n".join(line for line, _ in JSONL_LINES)
    path = tmp_path / ("rows.jsonl.zst" if compressed else "rows.jsonl")
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if compressed else data)
    manifest = run([path], tmp_path / "out", source="rows")
    offsets = [sum(len(line) + 1 for line, _ in JSONL_LINES[:n]) for n in range(len(JSONL_LINES))]
    expected = {
        f"{path.name}:byte {offset}": fate
        for offset, (_, fate) in zip(offsets, JSONL_LINES, strict=True)
        if fate != "kept"
    }
    found = {reject["position"]: reject["reason"] for reject in read(tmp_path / "out", "rejected")}
    assert found == expected
    kept = [fate for _, fate in JSONL_LINES].count("kept")
    assert (manifest.records_in, manifest.records_out) == (len(JSONL_LINES), kept)
    assert [record["text"] for record in read(tmp_path / "out")] == [
        *(CODE, "a\u2028b\x85c", "🙂 a pair", "x")
    ]


def test_a_utf16_jsonl_file_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"text": CODE}).encode("utf-16-le") + b"\n")
    stage, work = plan_ingest([str(path)], IngestOptions())
    with pytest.raises(TooManyRejects, match=r"\(json 1\)"):
        run_stage(stage, work, tmp_path / "out", Options(max_reject=0.9))


def test_a_missing_text_field_names_the_fields_there_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x", "title": "y"}\n{"text": "z"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:byte 0.*'body', 'title'.*text_field"):
        plan_ingest([str(path)], IngestOptions())
    assert run([path], tmp_path / "out", text_field="body").rejected == {"missing_field": 1}


def test_rows_of_the_stack_keep_their_provenance(tmp_path: Path) -> None:
    row = {
        "content": CODE,
        "max_stars_repo_name": "octo/cat",
        "max_stars_repo_path": "src/a.py",
        "max_stars_repo_head_hexsha": "abc123",
        "max_stars_repo_licenses": ["MIT", "Apache-2.0"],
        "max_stars_count": 7,
        "lang": "Python",
        "quality": {"score": 8},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run([tmp_path / "rows.jsonl"], tmp_path / "out", source="stack")
    (record,) = read(tmp_path / "out")
    assert record.pop("lineage")[0]["stage"] == "ingest"
    assert len(record.pop("id")) == 32
    assert record == {
        "text": CODE,
        "source": "stack",
        "repo": "octo/cat",
        "path": "src/a.py",
        "revision": "abc123",
        "license": "MIT AND Apache-2.0",
        "lang": "Python",
        "meta": {"max_stars_count": 7},
        "quality": {"score": 8},
    }


def test_parquet_rows_are_judged_one_by_one(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    good, bad = CODE.encode(), b"x = '\xff'"
    raw = pyarrow.array([good, bad, None, good + b"#2"], pyarrow.binary())
    texts = raw.view(pyarrow.string())  # as files written by other tools may hold it
    table = pyarrow.table({"content": texts, "n": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    manifest = run([tmp_path / "rows.parquet"], tmp_path / "out")
    assert manifest.rejected == {"type": 1, "utf8": 1}
    assert [r["meta"]["n"] for r in read(tmp_path / "out")] == [1, 4]
    data = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(data[: len(data) // 2])
    both = run([tmp_path / "rows.parquet", tmp_path / "torn.parquet"], tmp_path / "both")
    assert both.rejected == {"type": 1, "utf8": 1, "unreadable": 1}


def test_data_sets_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"code": [CODE, ""], "n": [1, 2]}).save_to_disk(tmp_path / "saved")
    manifest = run([tmp_path / "saved"], tmp_path / "out")
    assert (manifest.records_out, manifest.rejected) == (1, {"empty": 1})
    assert read(tmp_path / "out")[0]["text"] == CODE


def test_ids_are_stable_and_differ_between_equal_trees(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "src").mkdir(parents=True)
        (tmp_path / parent / "src" / "x.py").write_text(CODE)
    both = [tmp_path / "a" / "src", tmp_path / "b" / "src"]
    run(list(both), tmp_path / "one")
    first, second = (record["id"] for record in read(tmp_path / "one"))
    assert first != second
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "src").rename(tmp_path / "elsewhere" / "src")
    run([tmp_path / "elsewhere" / "src"], tmp_path / "moved")
    assert [record["id"] for record in read(tmp_path / "moved")] == [first]
    run([tmp_path / "elsewhere" / "src"], tmp_path / "other", source="other")
    assert read(tmp_path / "other")[0]["id"] not in (first, second)


def test_sizes_and_limit(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for size in range(1, 11):
        (tmp_path / "tree" / f"{size:02d}.py").write_text("x" * size)
    manifest = run([tmp_path / "tree"], tmp_path / "sizes", min_bytes=3, max_bytes=8)
    assert manifest.rejected == {"too_small": 2, "too_large": 2}
    run([tmp_path / "tree"], tmp_path / "limit", limit=4)
    assert [record["path"] for record in read(tmp_path / "limit")] == [
        *("01.py", "02.py", "03.py", "04.py")
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent", "no such file"),
        (lambda root: root / "a.txt", "not one of the kinds"),
        (lambda root: root / "pipe.jsonl", "not a regular file"),
        (lambda root: root / "nothing", "none of the files"),
    ],
)
def test_unusable_sources_are_named(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "nothing").mkdir()
    source = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        plan_ingest([str(source)], IngestOptions())
    assert str(source) in str(caught.value)


def test_nothing_kept_is_an_error_and_nothing_looks_finished(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "empty.py").write_text("")
    with pytest.raises(RunError, match="empty 1"):
        run([tmp_path / "tree"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read_manifest(tmp_path / "out.rejected").rejected == {"empty": 1}


def test_a_bomb_takes_bounded_memory(tmp_path: Path) -> None:

    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    block = b" " * 2**20
    with (tmp_path / "bomb.jsonl.zst").open("wb") as stream:
        stream.write(compressor.compress(b'{"text": "x"}\n{"text": "'))
        for _ in range(1500):
            stream.write(compressor.compress(block))
        stream.write(compressor.compress(b'"}\n{"text": "after"}\n') + compressor.flush())
    assert (tmp_path / "bomb.jsonl.zst").stat().st_size < 2**18
    before = reset_peak_memory()
    assert before is not None
    manifest = run([tmp_path / "bomb.jsonl.zst"], tmp_path / "out")
    grown = peak_memory() - before
    assert manifest.rejected == {"too_large": 1}
    assert [record["text"] for record in read(tmp_path / "out")] == ["x", "after"]
    assert grown < 700 * 2**20  # the bomb is 1500 MiB


def test_excluded_names_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("a.py", "site-packages/b.py", "deep/site-packages/c.py", "deep/d_test.py"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name = {name!r}\n")
    options = IngestOptions(exclude=["site-packages", "*_test.py"])
    stage, work = plan_ingest([str(tmp_path / "tree")], options)
    manifest, _ = run_stage(stage, work, tmp_path / "out", Options())
    assert (manifest.records_in, manifest.records_out) == (1, 1)
