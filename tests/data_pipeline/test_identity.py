"""One id never stands for two texts: how ids are made, and what happens where old ones do."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaphi.durable import file_sha256
from tests.data_pipeline.record_files import read
from tools.cli import main


def ingest(source: Path, out: Path) -> list[dict[str, Any]]:
    assert main(["data", "ingest", str(source), "--out", str(out), "--workers", "1"]) == 0
    return read(out)


def table(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)
    return path


def test_equal_places_of_other_texts_have_other_ids(tmp_path: Path) -> None:
    first = [f"print('lesson {n}')\n" for n in range(9)]
    second = [*first[:4], *(f"CONFIG_{n} = {n}\n" for n in range(4, 9))]
    name = "train-00000-of-00001.parquet"
    made = [
        ingest(table(tmp_path / side / name, texts), tmp_path / f"out-{side}")
        for side, texts in (("x", first), ("y", second))
    ]
    again = ingest(tmp_path / "x" / name, tmp_path / "again")
    ids = [[record["id"] for record in records] for records in (*made, again)]
    assert ids[0] == ids[2], "the same source gives the same ids"
    assert ids[0][:4] == ids[1][:4], "the same text in the same place"
    assert not set(ids[0][4:]) & set(ids[1][4:])
    assert len({*ids[0], *ids[1]}) == 9 + 5
    folder = tmp_path / "code"
    folder.mkdir()
    python = []
    for text in ("a = 1\n", "b = 2\n"):
        (folder / "main.py").write_text(text)
        python += ingest(folder, tmp_path / f"code-{text[0]}")
    assert python[0]["id"] != python[1]["id"]


def test_a_redacted_text_has_another_id(tmp_path: Path) -> None:
    texts = ["key = 'AKIAZ7VQ3X9K2LMN4PQR'\nprint(key)\n", "print('nothing to hide')\n"]
    records = ingest(table(tmp_path / "t.parquet", texts), tmp_path / "records")
    arguments = ["data", "heuristics", str(tmp_path / "records"), "--secrets", "redact"]
    arguments += ["--out", str(tmp_path / "clean"), "--max-reject", "1", "--signals-only"]
    assert main([*arguments, "--workers", "1"]) == 0
    for before, after in zip(records, read(tmp_path / "clean"), strict=True):
        assert (before["id"] == after["id"]) == (before["text"] == after["text"])
    assert "AKIA" not in read(tmp_path / "clean")[0]["text"]


def with_old_ids(records: Path, label: float | None = None) -> Path:
    """Give the records of a directory the ids of their places, as they once were."""
    manifest = json.loads((records / "manifest.json").read_text())
    (part,) = manifest["parts"]
    rows = read(records)
    for number, row in enumerate(rows):
        row["id"] = f"{number:032x}"
        if label is not None:
            row["quality"] = {"score": label if number % 2 else 0}
    path = records / part["name"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    (records / "manifest.json").write_text(json.dumps(manifest))
    return records


@pytest.fixture
def clash(tmp_path: Path) -> list[str]:
    """Two records directories whose ids are equal and whose texts are not."""
    made = []
    for side in "xy":
        texts = [f"def lesson_{side}_{n}(x):\n    return x * {n}\n" for n in range(60)]
        ingest(table(tmp_path / side / "t.parquet", texts), tmp_path / f"out-{side}")
        made.append(str(with_old_ids(tmp_path / f"out-{side}")))
    return made


STAGES = {
    "heuristics": ["--signals-only"],
    "dedup": [],
    "annotate": ["--samples", "120", "--model", "m", "--base-url", "http://127.0.0.1:9/v1"],
}


@pytest.mark.parametrize("stage", ["heuristics", "dedup", "annotate"])
def test_stages_stop_at_one_id_with_two_texts(
    tmp_path: Path, clash: list[str], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", stage, *clash, "--out", str(tmp_path / "out"), *STAGES[stage]]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    found = re.findall(r"(out-.)/part-00000.jsonl:(\d+)", error)
    assert [side for side, _ in found] == ["out-x", "out-y"]
    assert found[0][1] == found[1][1]
    assert "data ingest" in error
    assert not (tmp_path / "out").exists()
    # Alone each directory is sound, and the same directory twice over is refused as before.
    if stage != "annotate":
        assert main(["data", stage, clash[0], "--out", str(tmp_path / "out"), *STAGES[stage]]) == 0


def test_labels_of_another_text_stop_the_training(
    tmp_path: Path, clash: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with_old_ids(Path(clash[0]), label=5)
    arguments = ["data", "train-filter", clash[0], "--out", str(tmp_path / "filter")]
    assert main([*arguments, clash[1], "--trees", "5"]) == 2
    assert "label for another text" in capsys.readouterr().err
    assert main([*arguments, clash[0], "--trees", "5"]) == 0
