"""Token files: exact bytes, checks at open, and what killed or failing writers leave behind."""

import hashlib
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphi.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    TokenFileError,
    optimal_dtype,
)

# Written by megatron-core 0.16.1: uint16, documents [1,2,3], [4,5,50256], [], [7]+[8].
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0400 0500 50c4 0700 0800")
GOLDEN_IDX = bytes.fromhex(
    "4d4d4944494458000001000000000000"
    "00080400000000000000050000000000"
    "00000300000003000000010000000100"
    "00000000000000000000060000000000"
    "00000c000000000000000e0000000000"
    "00000000000000000000010000000000"
    "00000200000000000000020000000000"
    "000004000000000000 00"
)
DTYPES = ["u1", "i1", "i2", "i4", "i8", "u2"]
LENGTHS_AT, POINTERS_AT, DOCUMENTS_AT = 34, 34 + 4 * 4, 34 + 12 * 4


def write_golden(prefix: Path) -> IndexedDatasetWriter:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document(np.array([4, 5, 50256]))
        writer.add_document([], [])
        writer.add_document([7, 8], [1, 1])
    return writer


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_script(script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    # The root of the checkout, so that `megaphi` is found there when it is not installed.
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root)


def test_bytes_are_those_of_megatron_core(tmp_path: Path) -> None:
    writer = write_golden(tmp_path / "made.v1")
    assert (tmp_path / "made.v1.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "made.v1.idx").read_bytes() == GOLDEN_IDX
    assert files(tmp_path) == ["made.v1.bin", "made.v1.idx"]
    assert (writer.num_documents, writer.num_sequences, writer.num_tokens) == (4, 4, 8)
    assert writer.bin_sha256 == hashlib.sha256(GOLDEN_BIN).hexdigest()
    assert writer.idx_sha256 == hashlib.sha256(GOLDEN_IDX).hexdigest()


def test_reads_the_golden_file(tmp_path: Path) -> None:
    (tmp_path / "g.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "g.idx").write_bytes(GOLDEN_IDX)
    indexed = IndexedDataset(tmp_path / "g")
    assert indexed.dtype == np.uint16
    assert indexed.lengths.tolist() == [3, 3, 1, 1]
    assert indexed.lengths.dtype == np.int32
    assert indexed.lengths.flags.aligned
    assert indexed.pointers.tolist() == [0, 6, 12, 14]
    assert indexed.document_index.tolist() == [0, 1, 2, 2, 4]
    assert (len(indexed), indexed.num_tokens) == (4, 8)
    assert [indexed[n].tolist() for n in range(len(indexed))] == [
        [1, 2, 3],
        [4, 5, 50256],
        [7],
        [8],
    ]
    assert indexed.get(1, 1).tolist() == [5, 50256]
    assert indexed.get(1, 1, 1).tolist() == [5]
    assert indexed.get(1, 3).tolist() == []
    for i, offset, length in [(4, 0, None), (0, 1, 3), (0, 4, None), (0, -1, 2), (0, 2, -1)]:
        with pytest.raises(IndexError):
            indexed.get(i, offset, length)
    with pytest.raises(ValueError, match="read-only"):
        indexed[0][0] = 9
    copied = pickle.loads(pickle.dumps(indexed))
    assert copied[1].tolist() == [4, 5, 50256]


def test_optimal_dtype_follows_megatron() -> None:
    assert optimal_dtype(51_200) == optimal_dtype(65_499) == np.uint16
    assert optimal_dtype(65_500) == optimal_dtype(151_936) == np.int32


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_documents_come_back(data: st.DataObject, tmp_path_factory) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    limits = np.iinfo(dtype)
    ids = st.integers(int(limits.min), int(limits.max))
    documents = data.draw(
        st.lists(st.lists(st.lists(ids, max_size=6), max_size=3), min_size=1, max_size=8)
    )
    as_array = data.draw(st.booleans())
    prefix = tmp_path_factory.mktemp("any") / "t"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            flat = [token for sequence in document for token in sequence]
            tokens = np.array(flat, dtype) if as_array else flat
            writer.add_document(tokens, [len(sequence) for sequence in document])
    sequences = [sequence for document in documents for sequence in document]
    # What the format says, packed by hand.
    lengths = [len(sequence) for sequence in sequences]
    starts = [sum(lengths[:i]) * dtype.itemsize for i in range(len(lengths))]
    document_ends = [0]
    for document in documents:
        document_ends.append(document_ends[-1] + len(document))
    code = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}[dtype.str[1:]]
    packed = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(document_ends))
    packed += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    packed += struct.pack(f"<{len(document_ends)}q", *document_ends)
    assert Path(f"{prefix}.idx").read_bytes() == packed
    if sum(lengths) == 0:
        with pytest.raises(TokenFileError, match="no tokens"):
            IndexedDataset(prefix)
        return
    indexed = IndexedDataset(prefix)
    assert [indexed[n].tolist() for n in range(len(indexed))] == sequences
    assert indexed.document_index.tolist() == document_ends
    assert indexed.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_that_do_not_fit_are_refused_never_wrapped(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(dtype)
    with IndexedDatasetWriter(tmp_path / "t", dtype) as writer:
        for bad in (int(limits.max) + 1, int(limits.min) - 1):
            for tokens in ([1, bad], np.array([1, bad], np.int64 if dtype != "i8" else object)):
                with pytest.raises(ValueError, match=r"t: document 0"):
                    writer.add_document(tokens)
        assert (writer.num_tokens, writer.num_documents) == (0, 0)
        writer.add_document([int(limits.min), int(limits.max)])
    assert IndexedDataset(tmp_path / "t")[0].tolist() == [limits.min, limits.max]


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32"):
        IndexedDatasetWriter(tmp_path / "f", np.float32)
    with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
        for tokens in ([1.0], [[1, 2]], [True], np.array([1], np.float16)):
            with pytest.raises(ValueError, match="1-D array of integers"):
                writer.add_document(tokens)
        for lengths in ([1], [3, -1], [2, 1], []):
            with pytest.raises(ValueError, match="sequence lengths"):
                writer.add_document([1, 2], lengths)
        writer.add_document([5])
    assert (tmp_path / "t.bin").read_bytes() == b"\5\0"


def patch(at: int, fmt: str, value: int):
    def change(idx: bytearray) -> bytes:
        struct.pack_into(fmt, idx, at, value)
        return bytes(idx)

    return change


BROKEN_INDEXES = {
    "empty index": (lambda idx: b"", "34-byte header"),
    "cut in the header": (lambda idx: idx[:20], "34-byte header"),
    "cut in the arrays": (lambda idx: idx[:-1], "121 bytes"),
    "longer": (lambda idx: idx + b"\0", "123 bytes"),
    "modes appended": (lambda idx: idx + b"\0\0\0\0", "multimodal"),
    "not an index": (lambda idx: b"PK" + idx[2:], "not a Megatron index"),
    "version": (patch(9, "<Q", 2), "version 2"),
    "dtype float": (patch(17, "<B", 7), "code 7 is a float"),
    "dtype unknown": (patch(17, "<B", 9), "code 9 is unknown"),
    "dtype of other width": (patch(17, "<B", 4), "points to byte 6, expected 12"),
    "huge sequence count": (patch(18, "<Q", 2**63), "122 bytes"),
    "huge document count": (patch(26, "<Q", 2**64 - 1), "122 bytes"),
    "no document entries": (patch(26, "<Q", 0), "document index is empty"),
    "negative length": (patch(LENGTHS_AT, "<i", -3), "sequence 0 has length -3"),
    "overflowing length": (patch(LENGTHS_AT, "<i", 2**31 - 1), "sequence 1 points to byte 6"),
    "last length": (patch(LENGTHS_AT + 12, "<i", 2), "describes 9 uint16 tokens"),
    "negative pointer": (patch(POINTERS_AT, "<q", -6), "sequence 0 points to byte -6"),
    "pointer far away": (patch(POINTERS_AT + 8, "<q", 2**62), "expected 6"),
    "documents start late": (patch(DOCUMENTS_AT, "<q", 1), "starts with 1"),
    "documents run back": (patch(DOCUMENTS_AT + 8, "<q", 3), "runs back at entry 2"),
    "documents end early": (patch(DOCUMENTS_AT + 32, "<q", 3), "ends with 3"),
}


@pytest.mark.parametrize("case", BROKEN_INDEXES)
def test_broken_indexes_are_refused_at_open(tmp_path: Path, case: str) -> None:
    change, message = BROKEN_INDEXES[case]
    (tmp_path / "t.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "t.idx").write_bytes(change(bytearray(GOLDEN_IDX)))
    with pytest.raises(TokenFileError, match=message) as caught:
        IndexedDataset(tmp_path / "t")
    assert str(tmp_path / "t.") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [GOLDEN_BIN[:-1], GOLDEN_BIN[:-2], GOLDEN_BIN + b"\0\0", b""])
def test_bin_of_another_size_is_refused(tmp_path: Path, tokens: bytes) -> None:
    (tmp_path / "t.bin").write_bytes(tokens)
    (tmp_path / "t.idx").write_bytes(GOLDEN_IDX)
    with pytest.raises(TokenFileError, match=r"t\.bin: \d+ .*t\.idx.* 8"):
        IndexedDataset(tmp_path / "t")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"without \.bin"):
        IndexedDataset(tmp_path / "t")
    (tmp_path / "t.bin").write_bytes(GOLDEN_BIN)
    with pytest.raises(TokenFileError, match="interrupted"):
        IndexedDataset(tmp_path / "t")
    (tmp_path / "t.bin").unlink()
    (tmp_path / "t.idx").write_bytes(GOLDEN_IDX)
    with pytest.raises(TokenFileError, match=r"t\.bin: missing"):
        IndexedDataset(tmp_path / "t")


def test_multimodal_files_need_to_be_announced(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "t.idx").write_bytes(GOLDEN_IDX + bytes([0, 1, 0, 2]))
    with pytest.raises(TokenFileError, match="multimodal"):
        IndexedDataset(tmp_path / "t")
    indexed = IndexedDataset(tmp_path / "t", multimodal=True)
    assert indexed.modes is not None
    assert indexed.modes.tolist() == [0, 1, 0, 2]
    assert pickle.loads(pickle.dumps(indexed)).modes.tolist() == [0, 1, 0, 2]


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    lengths = [1_500_000_000, 1_500_000_000, 2]
    with (tmp_path / "big.bin").open("wb") as file:
        file.seek(2 * 3_000_000_000)  # a hole: takes no room on disk
        file.write(struct.pack("<2H", 11, 50_000))
    pointers = [0, 3_000_000_000, 6_000_000_000]
    (tmp_path / "big.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ3i3q4q", 1, 8, 3, 4, *lengths, *pointers, 0, 1, 2, 3)
    )
    indexed = IndexedDataset(tmp_path / "big")
    assert indexed.num_tokens == 3_000_000_002
    assert indexed[2].tolist() == [11, 50_000]
    assert indexed.get(1, 1_499_999_999).tolist() == [0]


def test_merging_equals_writing_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, rng.integers(0, 40)) for _ in range(60)]
    with IndexedDatasetWriter(tmp_path / "whole", np.uint16) as whole:
        for document in documents:
            whole.add_document(document)
    bounds = [0, 20, 20, 45, 60]  # the second part is empty
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        with IndexedDatasetWriter(tmp_path / f"part{part}", np.uint16) as writer:
            for document in documents[start:stop]:
                writer.add_document(document)
    with IndexedDatasetWriter(tmp_path / "merged", np.uint16) as merged:
        for part in range(4):
            digest = merged.add_index(tmp_path / f"part{part}")
            content = (tmp_path / f"part{part}.bin").read_bytes()
            assert digest == hashlib.sha256(content).hexdigest()
    for suffix in ("bin", "idx"):
        expected = (tmp_path / f"whole.{suffix}").read_bytes()
        assert (tmp_path / f"merged.{suffix}").read_bytes() == expected
    assert merged.num_documents == whole.num_documents == 60
    assert merged.num_tokens == whole.num_tokens
    assert merged.bin_sha256 == whole.bin_sha256


def test_merging_another_dtype_is_refused(tmp_path: Path) -> None:
    write_golden(tmp_path / "a")
    with (
        pytest.raises(ValueError, match=r"uint16.*int32"),
        IndexedDatasetWriter(tmp_path / "out", np.int32) as writer,
    ):
        writer.add_index(tmp_path / "a")
    assert files(tmp_path) == ["a.bin", "a.idx"]


def test_an_exception_keeps_the_older_build(tmp_path: Path) -> None:
    write_golden(tmp_path / "t")

    def interrupted_build() -> None:
        with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
            writer.add_document(list(range(1000)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_build()
    assert files(tmp_path) == ["t.bin", "t.idx"]
    assert (tmp_path / "t.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "t.idx").read_bytes() == GOLDEN_IDX


@pytest.mark.parametrize("older", [False, True])
def test_a_killed_writer_leaves_no_final_files(tmp_path: Path, older: bool) -> None:
    if older:
        write_golden(tmp_path / "t")
    before = files(tmp_path)
    process = run_script(
        """
        import sys
        from megaphi.data.indexed import IndexedDatasetWriter
        with IndexedDatasetWriter(sys.argv[1], "uint16") as writer:
            for i in range(10**9):
                writer.add_document(range(5000))
                if i == 300:
                    print("writing", flush=True)
        """,
        tmp_path / "t",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = [name for name in files(tmp_path) if name not in before]
    assert len(left) == 2
    assert all(f".tmp-{process.pid}-" in name for name in left)
    assert max((tmp_path / name).stat().st_size for name in left) >= 1_000_000
    if older:
        assert IndexedDataset(tmp_path / "t")[1].tolist() == [4, 5, 50256]


def test_killed_between_the_renames_an_older_index_does_not_survive(tmp_path: Path) -> None:
    """The same number of tokens: an old .idx beside the new .bin would pass every check."""
    write_golden(tmp_path / "t")
    process = run_script(
        """
        import os, signal, sys
        from megaphi import durable
        from megaphi.data.indexed import IndexedDatasetWriter
        publish_file = durable.NewFile.publish
        def publish_and_die(self):
            publish_file(self)
            os.kill(os.getpid(), signal.SIGKILL)
        durable.NewFile.publish = publish_and_die
        with IndexedDatasetWriter(sys.argv[1], "uint16") as writer:
            writer.add_document([9] * 8, [2, 2, 2, 2])
        """,
        tmp_path / "t",
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "t.bin").read_bytes() == b"\t\0" * 8
    with pytest.raises(TokenFileError, match="interrupted"):
        IndexedDataset(tmp_path / "t")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    process = run_script(
        """
        import resource, sys
        from megaphi.data.indexed import IndexedDatasetWriter, TokenFileError
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
        try:
            with IndexedDatasetWriter(sys.argv[1], "uint16") as writer:
                for _ in range(1000):
                    writer.add_document(range(5000))
        except TokenFileError as error:
            print(error)
        """,
        tmp_path / "t",
    )
    output, errors = process.communicate()
    assert output.startswith(f"{tmp_path}/t.bin.tmp-{process.pid}-")
    assert "cannot write: File too large; t.bin was not created" in output
    assert errors == ""
    assert files(tmp_path) == []


def test_data_modules_do_not_import_torch() -> None:
    process = run_script(
        """
        import sys
        import megaphi.data.blend, megaphi.data.dataset, megaphi.data.indexed, megaphi.data.sidecar
        print("torch" in sys.modules)
        """
    )
    assert process.communicate() == ("False\n", "")


def test_files_are_published_with_the_usual_permissions(tmp_path: Path) -> None:
    write_golden(tmp_path / "t")
    (tmp_path / "plain").touch()
    for name in ("t.bin", "t.idx"):
        assert os.stat(tmp_path / name).st_mode == os.stat(tmp_path / "plain").st_mode
