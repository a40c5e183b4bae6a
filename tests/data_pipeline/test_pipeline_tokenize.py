"""From records to token files: what is in them, their order, provenance, reuse and merging."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data_pipeline.runner.stage import Options, Stage, Tally, Work, run_stage
from data_pipeline.tokens import tokenize_records as module
from data_pipeline.tokens.merge_tokens import merge_tokens
from data_pipeline.tokens.tokenize_records import documents_path, tokenize_records
from data_pipeline.tokens.tokenizer import load_tokenizer
from data_pipeline.tokens.train_tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from megaphi.data.indexed import IndexedDataset, token_file_paths
from megaphi.data.sidecar import read_info, verify_info
from megaphi.errors import RunError

EOD = 50256
TEXTS = [
    *(f"def f_{n}(x):\n    return x + {n}\n" for n in range(30)),
    "<|endoftext|>",
    "x = '<|endoftext|>'  # <|endoftext|>\n",
    "naïve 数据 🙂\u2028end\x85",
    "    \t\t\n" * 40,
]


def emit(shard: list[dict[str, Any]], config: Any, tally: Tally) -> Any:
    for record in shard:
        tally.records_in += 1
        yield dict(record)


def write_records(out: Path, texts: list[str], per_part: int = 7, **extra: Any) -> Path:
    """Make a records directory with the engine; `per_part` texts in each part."""
    rows = [
        {"id": f"{n:032x}", "text": text, "source": "test", "path": f"p/{n}.py", **extra}
        for n, text in enumerate(texts)
    ]
    shards = [rows[start : start + per_part] for start in range(0, len(rows), per_part)]
    work = Work(
        shards=shards, fingerprint=[], describe=lambda _: [], identify=lambda: [{"never": 1}]
    )
    stage = Stage(name="emit", version="1", config={}, function=emit)
    run_stage(stage, work, out, Options())
    return out


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("corpus") / "records", TEXTS, license="MIT")


def digests(prefix: Path) -> dict[str, str]:
    suffixes = (".bin", ".idx", ".json", ".documents.jsonl")
    return {
        suffix: hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in suffixes
    }


def table(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in documents_path(prefix).read_bytes().split(b"\n")[:-1]]


def test_the_tokenizer_travels_with_the_tokens(tmp_path: Path, records: Path) -> None:
    """Its copy encodes as the original does, and merging keeps it."""
    tokenize_records(records, "codegen", tmp_path / "a")
    merge_tokens([tmp_path / "a"], tmp_path / "m")
    for prefix in ("a", "m"):
        copy = load_tokenizer(str(tmp_path / f"{prefix}.tokenizer"))
        assert copy.sha256 == load_tokenizer("codegen").sha256


def test_documents_round_trip_and_end_with_one_eod(tmp_path: Path, records: Path) -> None:
    result = tokenize_records(records, "codegen", tmp_path / "t", shuffle_seed=None)
    data, tokenizer = IndexedDataset(tmp_path / "t"), load_tokenizer("codegen")
    assert data.dtype == np.uint16
    assert len(data) == len(TEXTS) == result.info.num_documents
    for text, ids in zip(TEXTS, data, strict=True):
        assert ids.tolist().count(EOD) == 1
        assert ids[-1] == EOD
        assert tokenizer.decode(ids[:-1]) == text
    assert verify_info(tmp_path / "t") == result.info


def test_the_ids_are_those_of_the_library(tmp_path: Path, records: Path) -> None:
    load_tokenizer("codegen").save(tmp_path / "saved")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    library.encode_special_tokens = True
    tokenize_records(records, "codegen", tmp_path / "t", shuffle_seed=None)
    made = IndexedDataset(tmp_path / "t")
    expected = [[*library.encode(text).ids, EOD] for text in TEXTS]
    assert [made[n].tolist() for n in range(len(made))] == expected
    flat = np.fromfile(tmp_path / "t.bin", "<u2").tolist()
    assert flat == [token for ids in expected for token in ids]


def test_each_token_can_be_traced_to_its_record(tmp_path: Path, records: Path) -> None:
    tokenize_records(records, "codegen", tmp_path / "t", shuffle_seed=5)
    tokenizer, rows = load_tokenizer("codegen"), table(tmp_path / "t")
    assert [row["index"] for row in rows] == list(range(len(TEXTS)))
    order = [int(row["id"], 16) for row in rows]
    assert order != sorted(order)
    assert sorted(order) == list(range(len(TEXTS)))
    for row, ids in zip(rows, IndexedDataset(tmp_path / "t"), strict=True):
        number = int(row["id"], 16)
        assert tokenizer.decode(ids[:-1]) == TEXTS[number]
        assert (row["source"], row["license"], row["path"]) == ("test", "MIT", f"p/{number}.py")


def test_the_order_is_the_seed_s_alone(tmp_path: Path, records: Path) -> None:
    for name, seed, workers in (("a", 1234, 1), ("b", 1234, 3), ("c", 99, 1), ("d", None, 2)):
        tokenize_records(records, "codegen", tmp_path / name, shuffle_seed=seed, workers=workers)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    orders = [[row["id"] for row in table(tmp_path / name)] for name in "abcd"]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[1:]}) == 3
    # What numpy's frozen generator draws, so that no release of ours changes a corpus.
    expected = np.random.RandomState(1234).permutation(len(TEXTS)).tolist()
    assert [int(identity, 16) for identity in orders[0]] == expected


def test_parts_do_not_matter_without_a_shuffle(tmp_path: Path, records: Path) -> None:
    other = write_records(tmp_path / "records", TEXTS, per_part=100, license="MIT")
    tokenize_records(records, "codegen", tmp_path / "a", shuffle_seed=None)
    tokenize_records(other, "codegen", tmp_path / "b", shuffle_seed=None)
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {k: v for k, v in first.items() if k != ".json"} == {
        k: v for k, v in second.items() if k != ".json"
    }


def test_small_batches_give_the_same_bytes(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_records(records, "codegen", tmp_path / "a")
    monkeypatch.setattr(module, "BATCH_BYTES", 50)
    tokenize_records(records, "codegen", tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_records_without_tokens_are_counted_rejects(tmp_path: Path) -> None:
    texts = ["a", "", "b", "", "c"]
    records = write_records(tmp_path / "records", texts, per_part=2)
    result = tokenize_records(records, "codegen", tmp_path / "t")
    assert (result.rejected, result.info.num_documents) == ({"no_tokens": 2}, 3)
    rejected = (tmp_path / "t.rejected.jsonl").read_bytes().split(b"\n")[:-1]
    assert sorted(int(json.loads(line)["id"], 16) for line in rejected) == [1, 3]
    assert sorted(int(row["id"], 16) for row in table(tmp_path / "t")) == [0, 2, 4]
    empty = write_records(tmp_path / "empty", ["", ""])
    with pytest.raises(RunError, match="no document"):
        tokenize_records(empty, "codegen", tmp_path / "none")
    assert not token_file_paths(tmp_path / "none").bin.exists()


def test_a_surrogate_that_got_so_far_is_a_reject(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records", ["good", "HERE"])
    part = records / "part-00000.jsonl"
    data = part.read_bytes().replace(b"HERE", b"\\ud800")
    part.write_bytes(data)
    manifest = json.loads((records / "manifest.json").read_text())
    manifest["parts"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (records / "manifest.json").write_text(json.dumps(manifest))
    result = tokenize_records(records, "codegen", tmp_path / "t")
    assert (result.rejected, result.info.num_documents) == ({"surrogate": 1}, 1)


def test_records_that_were_changed_are_refused(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records", ["one", "two"])
    part = records / "part-00000.jsonl"
    part.write_bytes(part.read_bytes().replace(b"one", b"ONE"))
    with pytest.raises(RunError, match=r"part-00000\.jsonl"):
        tokenize_records(records, "codegen", tmp_path / "t")
    assert [path.name for path in tmp_path.glob("t.*")] == ["t.partial"]


def test_a_finished_token_file_is_reused_or_defended(tmp_path: Path, records: Path) -> None:
    prefix = tmp_path / "t"
    first = tokenize_records(records, "codegen", prefix)
    stamp = (tmp_path / "t.bin").stat().st_mtime_ns
    again = tokenize_records(records, "codegen", prefix, workers=2)
    assert again.reused
    assert again.info == first.info
    assert (tmp_path / "t.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="overwrite"):
        tokenize_records(records, "codegen", prefix, shuffle_seed=7)
    assert (
        tokenize_records(records, "codegen", prefix, shuffle_seed=7, overwrite=True).reused is False
    )
    (tmp_path / "t.json").unlink()  # as Megatron writes them: without a description
    with pytest.raises(ValueError, match="another token file"):
        tokenize_records(records, "codegen", prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("t.bin", "t.documents.jsonl", "t.idx", "t.tokenizer")
    ]


def test_merging_joins_tokens_and_provenance(tmp_path: Path, records: Path) -> None:
    other = write_records(tmp_path / "records", ["another", "text"])
    tokenize_records(records, "codegen", tmp_path / "a")
    tokenize_records(other, "codegen", tmp_path / "b")
    info, has_table, _ = merge_tokens([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert info is not None
    assert has_table
    assert verify_info(tmp_path / "m") == info
    joined = (tmp_path / "a.bin").read_bytes() + (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "m.bin").read_bytes() == joined
    rows = table(tmp_path / "m")
    assert [row["index"] for row in rows] == list(range(len(TEXTS) + 2))
    sources = [*table(tmp_path / "a"), *table(tmp_path / "b")]
    assert [row["id"] for row in rows] == [row["id"] for row in sources]
    with pytest.raises(ValueError, match="overwrite"):
        merge_tokens([tmp_path / "a"], tmp_path / "m")
    documents_path(tmp_path / "b").unlink()
    assert not merge_tokens([tmp_path / "a", tmp_path / "b"], tmp_path / "n")[1]
    assert not documents_path(tmp_path / "n").exists()


def test_a_provenance_file_that_does_not_fit_stops_the_merge(tmp_path: Path, records: Path) -> None:
    tokenize_records(records, "codegen", tmp_path / "a")
    path = documents_path(tmp_path / "a")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:-2]) + b"\n")
    with pytest.raises(RunError, match=r"33 .*34"):
        merge_tokens([tmp_path / "a"], tmp_path / "m")
    path.write_bytes(b"\n".join(lines[1:]))
    with pytest.raises(RunError, match=r"documents\.jsonl:1"):
        merge_tokens([tmp_path / "a"], tmp_path / "m")
    assert not list(tmp_path.glob("m.*"))


def test_training_a_tokenizer_is_deterministic_and_laid_out_as_codegen(
    tmp_path: Path, records: Path
) -> None:
    made = train_tokenizer([records], tmp_path / "one", 340)
    # Another process: the library's hash maps are seeded anew there.
    arguments = [records, "--vocab-size", 340, "--out", tmp_path / "two"]
    subprocess.run(
        [sys.executable, "-m", "megaphi", "data", "train-tokenizer", *map(str, arguments)],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        check=True,
        timeout=60,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one")
    assert (tokenizer.vocab_size, tokenizer.sha256) == (340, made.sha256)
    assert tokenizer.eod_id == 340 - 39
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(runs)] == [
        [340 - 38 + n] for n in range(38)
    ]
    vocabulary = json.loads((tmp_path / "one" / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("ĠĠ" in token or "ĉĉ" in token for token in vocabulary)
    assert train_tokenizer([records], tmp_path / "one", 340).reused
    with pytest.raises(ValueError, match="overwrite"):
        train_tokenizer([records], tmp_path / "one", 341)
    with pytest.raises(ValueError, match=f"at least {MIN_VOCAB_SIZE}"):
        train_tokenizer([records], tmp_path / "three", MIN_VOCAB_SIZE - 1)


def test_training_on_a_sample_reads_about_that_much(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records", [f"text {n} " * 20 for n in range(500)], 100)
    whole = train_tokenizer([records], tmp_path / "whole", 300)
    tenth = train_tokenizer([records], tmp_path / "tenth", 300, max_bytes=whole.text_bytes // 10)
    assert whole.num_texts == 500
    assert 0.05 < tenth.text_bytes / whole.text_bytes < 0.2


def test_a_tokenizer_of_several_corpora_hears_the_small_one(tmp_path: Path) -> None:
    large = write_records(tmp_path / "large", [f"aaaa {n} " * 50 for n in range(400)], 100)
    small = write_records(tmp_path / "small", [f"zzzz {n} " * 5 for n in range(40)], 100)
    size = sum(part.stat().st_size for part in small.glob("*.jsonl"))
    made = train_tokenizer([large, small], tmp_path / "both", 302, max_bytes=2 * size)
    vocabulary = json.loads((made.path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"aaaa", "zzzz"} <= set(vocabulary)
    assert train_tokenizer([large, small], tmp_path / "both", 302, max_bytes=2 * size).reused
    with pytest.raises(ValueError, match="overwrite"):
        train_tokenizer([small, large], tmp_path / "both", 302, max_bytes=2 * size)


def test_a_large_vocabulary_is_stored_as_int32(tmp_path: Path, records: Path) -> None:
    load_tokenizer("codegen").save(tmp_path / "big")
    path = tmp_path / "big" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"] += [
        {**value["added_tokens"][-1], "id": 50295 + n, "content": f"<added {n:05d}>"}
        for n in range(66_000 - 50_295)
    ]
    path.write_text(json.dumps(value))
    tokenize_records(records, str(tmp_path / "big"), tmp_path / "t", shuffle_seed=None)
    assert IndexedDataset(tmp_path / "t").dtype == np.int32
    info = read_info(tmp_path / "t")
    assert info is not None
    assert info.vocab_size == 66_000
    tokenize_records(records, "codegen", tmp_path / "small", shuffle_seed=None)
    assert (
        np.fromfile(tmp_path / "t.bin", "<i4").tolist()
        == np.fromfile(tmp_path / "small.bin", "<u2").tolist()
    )
