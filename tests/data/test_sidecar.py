"""Descriptions beside token files, and merging and splitting with them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from megaphi.data.indexed import IndexedDataset, IndexedDatasetWriter, TokenFileError
from megaphi.data.sidecar import (
    TokenFileInfo,
    merge_token_files,
    read_info,
    verify_info,
    write_info,
)


def make(prefix: Path, documents: list[list[int]], **changes: object) -> TokenFileInfo:
    """A token file of one-sequence documents with a description that fits it."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    tokens, index = (Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    values = {
        "tokenizer": "codegen",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 51_200,
        "eod_id": 50_256,
        "num_documents": len(documents),
        "num_sequences": len(documents),
        "num_tokens": len(tokens) // 2,
        "bin_sha256": hashlib.sha256(tokens).hexdigest(),
        "idx_sha256": hashlib.sha256(index).hexdigest(),
        "bin_bytes": len(tokens),
        "idx_bytes": len(index),
        "recipe": {"from": prefix.name, "note": "é"},
    }
    info = TokenFileInfo(**{**values, **changes})
    write_info(prefix, info)
    return info


DOCUMENTS = [[1, 2, 3], [4, 50_256], [], [7], [8, 9]]


def test_descriptions_come_back(tmp_path: Path) -> None:
    assert read_info(tmp_path / "t") is None
    info = make(tmp_path / "t", DOCUMENTS)
    assert read_info(tmp_path / "t") == info
    assert verify_info(tmp_path / "t") == info
    stored = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert stored == dataclasses.asdict(info)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx", "t.json"]


def test_plain_megatron_files_have_nothing_to_verify(tmp_path: Path) -> None:
    make(tmp_path / "t", DOCUMENTS)
    (tmp_path / "t.json").unlink()
    assert verify_info(tmp_path / "t") is None


def test_rebuilding_drops_the_old_description(tmp_path: Path) -> None:
    make(tmp_path / "t", DOCUMENTS)
    with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
        writer.add_document([5])
    assert read_info(tmp_path / "t") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: "{", "not JSON"),
        (lambda values: "[" * 100_000, "not JSON"),
        (lambda values: "[]", "missing keys"),
        (lambda values: json.dumps({**values, "extra": 1}), r"unknown \['extra'\]"),
        (lambda values: json.dumps({**values, "eod_id": "7"}), "eod_id must be int"),
        (lambda values: json.dumps({**values, "eod_id": True}), "eod_id must be int"),
        (lambda values: json.dumps({**values, "tokenizer": None}), "tokenizer must be str"),
        (lambda values: json.dumps({**values, "recipe": []}), "recipe must be dict"),
        (lambda values: b"\xff\xfe\xfa", "not JSON"),
    ],
)
def test_broken_descriptions_are_named(tmp_path: Path, change, message: str) -> None:
    info = make(tmp_path / "t", DOCUMENTS)
    content = change(dataclasses.asdict(info))
    (tmp_path / "t.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenFileError, match=message) as caught:
        read_info(tmp_path / "t")
    assert str(caught.value).startswith(f"{tmp_path}/t.json: ")


def test_one_changed_token_is_found(tmp_path: Path) -> None:
    make(tmp_path / "t", DOCUMENTS)
    path = tmp_path / "t.bin"
    path.write_bytes(b"\x09" + path.read_bytes()[1:])
    assert IndexedDataset(tmp_path / "t")[0].tolist() == [9, 2, 3]
    assert verify_info(tmp_path / "t", deep=False) is not None
    with pytest.raises(TokenFileError, match=r"t\.bin: SHA-256 differs"):
        verify_info(tmp_path / "t")


def test_an_index_of_another_file_is_found(tmp_path: Path) -> None:
    make(tmp_path / "t", [[1, 2], [3]])
    make(tmp_path / "other", [[1], [2, 3]])
    (tmp_path / "t.idx").write_bytes((tmp_path / "other.idx").read_bytes())
    with pytest.raises(TokenFileError, match=r"t\.idx: SHA-256 differs"):
        verify_info(tmp_path / "t")


def test_a_file_that_grew_is_found_without_hashing(tmp_path: Path) -> None:
    make(tmp_path / "t", [[1, 2], [3]])
    make(tmp_path / "other", [[1], [2, 3], [4]])
    for suffix in ("bin", "idx"):
        path = tmp_path / f"t.{suffix}"
        path.write_bytes((tmp_path / f"other.{suffix}").read_bytes())
    with pytest.raises(TokenFileError, match=r"t\.bin: 8 .*t\.json.* 6"):
        verify_info(tmp_path / "t", deep=False)


def test_counts_and_vocabulary_are_compared(tmp_path: Path) -> None:
    make(tmp_path / "t", [[1, 2], [3]], num_tokens=4)
    with pytest.raises(TokenFileError, match=r"records \(2, 2, 4\)"):
        verify_info(tmp_path / "t", deep=False)
    make(tmp_path / "t", [[1, 2], [50_999]], vocab_size=50_999)
    with pytest.raises(TokenFileError, match="50999"):
        verify_info(tmp_path / "t")
    make(tmp_path / "t", [[1, 2], [50_999]], vocab_size=51_000)
    assert verify_info(tmp_path / "t") is not None


def test_merging(tmp_path: Path) -> None:
    parts = [[], DOCUMENTS[:2], DOCUMENTS[2:3], DOCUMENTS[3:]]
    infos = [make(tmp_path / f"p{i}", part) for i, part in enumerate(parts)]
    whole = make(tmp_path / "whole", DOCUMENTS)
    merged = merge_token_files([tmp_path / f"p{i}" for i in range(4)], tmp_path / "out" / "m")
    assert merged is not None
    assert [source["name"] for source in merged.recipe["merged"]] == ["p0", "p1", "p2", "p3"]
    digests = [source["bin_sha256"] for source in merged.recipe["merged"]]
    assert digests == [info.bin_sha256 for info in infos]
    assert dataclasses.replace(merged, recipe=whole.recipe) == whole
    assert verify_info(tmp_path / "out" / "m") == merged
    assert read_info(tmp_path / "out" / "m") == merged


def test_merging_without_descriptions(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, DOCUMENTS)
        (tmp_path / f"{name}.json").unlink()
    assert merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "m") is None
    assert IndexedDataset(tmp_path / "m").num_tokens == 16
    assert not (tmp_path / "m.json").exists()


def test_files_that_do_not_belong_together_are_not_merged(tmp_path: Path) -> None:
    make(tmp_path / "a", DOCUMENTS)
    make(tmp_path / "b", DOCUMENTS, tokenizer_sha256="cd" * 32)
    make(tmp_path / "c", DOCUMENTS)
    (tmp_path / "c.json").unlink()
    a, out = tmp_path / "a", tmp_path / "m"
    with pytest.raises(ValueError, match=r"codegen cdcdcdcdcdcd .* cannot be merged"):
        merge_token_files([a, tmp_path / "b"], out)
    with pytest.raises(ValueError, match=r"unknown tokenizer .* cannot be merged"):
        merge_token_files([a, tmp_path / "c"], out)
    with pytest.raises(ValueError, match="source and output"):
        merge_token_files([a, tmp_path / "c"], tmp_path / "x" / ".." / "a")
    with pytest.raises(ValueError, match="token files"):
        merge_token_files([], out)
    with pytest.raises(FileNotFoundError, match="token file"):
        merge_token_files([tmp_path / "nothing"], out)
    assert not list(tmp_path.glob("m*"))


def test_a_damaged_source_is_not_merged(tmp_path: Path) -> None:
    make(tmp_path / "a", DOCUMENTS)
    make(tmp_path / "b", DOCUMENTS)
    path = tmp_path / "b.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(TokenFileError, match=r"b\.bin: SHA-256 differs"):
        merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not list(tmp_path.glob("m*"))
