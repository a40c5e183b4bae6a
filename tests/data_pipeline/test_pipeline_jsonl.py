"""Lines of bytes: what ends one, how long it may be, and compressed files that are whole or not."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import zstandard

from data_pipeline.records import jsonl
from data_pipeline.records.jsonl import LineWriter, open_jsonl, read_lines
from megaphi.durable import file_sha256

# Everything that str.splitlines takes for the end of a line, besides the line feed.
SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def lines_of(data: bytes) -> list[tuple[int, bytes | None]]:
    return list(read_lines(io.BytesIO(data)))


def test_only_a_line_feed_ends_a_line() -> None:
    rows = [{"text": SEPARATORS}, {"text": "x\r\ny"}, {"text": ""}]
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    assert len(data.decode().splitlines()) > len(rows)
    assert [json.loads(line or b"") for _, line in lines_of(data)] == rows


def test_offsets_point_to_the_lines() -> None:
    data = b"one\n\n  \nfour\r\nlast without line feed"
    found = lines_of(data)
    assert [line for _, line in found] == [b"one", b"four\r", b"last without line feed"]
    for offset, line in found:
        assert line is not None
        assert data[offset:].startswith(line)


@pytest.mark.parametrize("excess", [0, 1, 63, 64, 65, 1000])
def test_overlong_lines_are_skipped_and_the_next_is_found(
    monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(jsonl, "READ_BYTES", 16)
    data = b"before\n" + b"x" * (64 + excess) + b"\nafter\n"
    assert lines_of(data) == [(0, b"before"), (7, None), (7 + 64 + excess + 1, b"after")]


def test_overlong_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 64)
    assert lines_of(b"ok\n" + b"x" * 500) == [(0, b"ok"), (3, None)]


@pytest.mark.parametrize("name", ["part.jsonl", "part.jsonl.zst"])
def test_writer_and_reader_agree_with_the_libraries(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [f"row {number} {SEPARATORS * number}\n".encode() for number in range(200)]
    with LineWriter(path) as writer:
        for row in rows:
            writer.write(row)
    data = path.read_bytes()
    assert writer.sha256 == hashlib.sha256(data).hexdigest() == file_sha256(path)
    assert (writer.lines, writer.text_bytes) == (200, sum(map(len, rows)))
    plain = data
    if name.endswith(".zst"):
        plain = zstandard.ZstdDecompressor().stream_reader(data).read()
        assert len(data) < len(plain)
    assert plain == b"".join(rows)
    with open_jsonl(path) as stream:
        assert [(line or b"") + b"\n" for _, line in read_lines(stream)] == rows


def test_zstandard_files_of_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [b"first\nsec", b"", b"ond\nthird\n" * 5000]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    with open_jsonl(path) as stream:
        assert stream.read() == b"".join(frames)


@pytest.mark.parametrize("keep", [5, 0.5, -1])
def test_truncated_zstandard_files_are_an_error_not_an_early_end(
    tmp_path: Path, keep: float
) -> None:
    path = tmp_path / "a.jsonl.zst"
    text = b"".join(f"line {number * 7919 % 10007}\n".encode() for number in range(20000))
    data = zstandard.ZstdCompressor().compress(text)
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(OSError, match="too early"), open_jsonl(path) as stream:
        stream.read()


def test_what_is_no_zstandard_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(OSError, match="not Zstandard"), open_jsonl(path) as stream:
        stream.read()
