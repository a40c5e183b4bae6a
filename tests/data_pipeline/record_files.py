"""Records directories for tests of stages, and their lines read without the code under test."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ingest import stage as ingest
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.runner.stage import Options, run_stage


def write_records(root: Path, files: list[list[dict[str, Any]]], name: str = "records") -> Path:
    """A records directory with one part for each list of rows."""
    raw = root / f"{name}-raw"
    raw.mkdir(parents=True)
    for number, rows in enumerate(files):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (raw / f"{number:03d}.jsonl").write_text(lines, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "SHARD_BYTES", 1)
        options = IngestOptions(max_bytes=8 * 2**20)
        run_stage(*plan_ingest([str(raw)], options), root / name, Options(max_reject=1))
    return root / name


def read(out: Path, kind: str = "part") -> list[dict[str, Any]]:
    """The lines of the parts or rejects of a records directory."""
    files = sorted(out.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]
