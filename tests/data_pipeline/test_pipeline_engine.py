"""The engine: order, accounting, reuse, limits, and workers that die."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.records.record import Record, Reject
from data_pipeline.runner.output import Manifest, read_manifest
from data_pipeline.runner.pool import run_tasks
from data_pipeline.runner.stage import Options, Stage, Tally, Work, run_stage
from megaphi.errors import RunError, TooManyRejects


def keep_even(shard: list[int], config: dict[str, Any], tally: Tally) -> Iterator[Record | Reject]:
    """A stage function: even numbers are kept, odd ones rejected, `lost` ones vanish."""
    tally.inputs.append(shard)
    for number in shard:
        tally.records_in += 1
        if number == config.get("lost"):
            continue
        if number % 2 or config.get("keep") is False:
            yield Reject(f"{number:032x}", "odd", "an odd number", f"shard:{number}")
        else:
            record = {"id": f"{number:032x}", "text": f"é{number}", "source": "test", "new": [1]}
            yield record


def stage(**config: Any) -> Stage:
    return Stage(name="even", version="1", config=config, function=keep_even)


def work(numbers: int = 40, size: int = 4, label: str = "a") -> Work:
    shards = [list(range(start, start + size)) for start in range(0, numbers, size)]
    inputs = [{"path": "somewhere", "files": len(shards), "bytes": 0, "sha256": label}]
    return Work(
        shards=shards, fingerprint=label, describe=lambda _: inputs, identify=lambda: inputs
    )


def lines(out: Path, kind: str = "part") -> list[dict[str, Any]]:
    files = sorted(out.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("workers", [1, 2])
def test_records_rejects_and_manifest_agree(tmp_path: Path, workers: int) -> None:
    out = tmp_path / "deep" / "out"
    manifest, reused = run_stage(stage(), work(), out, Options(workers=workers))
    assert not reused
    assert [record["text"] for record in lines(out)] == [f"é{n}" for n in range(0, 40, 2)]
    assert [int(reject["id"], 16) for reject in lines(out, "rejected")] == list(range(1, 40, 2))
    assert lines(out)[0]["new"] == [1]
    assert [entry["stage"] for entry in lines(out)[0]["lineage"]] == ["even"]
    assert (manifest.records_in, manifest.records_out, manifest.rejected) == (40, 20, {"odd": 20})
    assert manifest.text_bytes == sum(len(f"é{n}".encode()) for n in range(0, 40, 2))
    assert read_manifest(out) == manifest
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_document_that_vanishes_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"shard 1.* 4 .* 3"):
        run_stage(stage(lost=6), work(), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_a_finished_output_is_reused_only_for_the_same_inputs_and_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, _ = run_stage(stage(), work(), out, Options())
    before = (out / "part-00000.jsonl").stat().st_mtime_ns
    again, reused = run_stage(stage(), work(), out, Options(workers=2))
    assert (again, reused) == (first, True)
    assert (out / "part-00000.jsonl").stat().st_mtime_ns == before
    newer = replace(stage(), version="2")
    for other in ((stage(x=1), work()), (newer, work()), (stage(), work(label="b"))):
        with pytest.raises(ValueError, match="overwrite"):
            run_stage(*other, out, Options())
    replaced, reused = run_stage(stage(x=1), work(8), out, Options(overwrite=True))
    assert not reused
    assert read_manifest(out) == replaced != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_are_not_ours_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.tex").write_text("x")
    for name in ("out", "other"):
        with pytest.raises(ValueError, match=r"holds files that no stage made|in the way"):
            run_stage(stage(), work(), tmp_path / name, Options(overwrite=True))
    assert len(list(tmp_path.rglob("thesis.tex"))) == 2


def test_damage_to_an_output_is_found_when_it_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_stage(stage(), work(), out, Options())
    part = out / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"part-00000\.jsonl"):
        run_stage(stage(), work(), out, Options())
    (out / "manifest.json").write_text('{"stage": 1')
    with pytest.raises(RunError, match=r"manifest\.json"):
        read_manifest(out)


def test_too_many_rejects_are_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyRejects, match=r"20 of 40 .*odd 20.*0\.49.*rejected"):
        run_stage(stage(), work(), out, Options(max_reject=0.49))
    assert not out.exists()
    assert len(lines(tmp_path / "out.rejected", "rejected")) == 20
    with pytest.raises(RunError, match="no document was kept"):
        run_stage(stage(keep=False), work(), out, Options(max_reject=1))
    assert not out.exists()
    assert read_manifest(tmp_path / "out.rejected").records_out == 0
    run_stage(stage(), work(), out, Options(max_reject=0.5))
    assert read_manifest(out).records_out == 20


def test_two_runs_cannot_write_to_the_same_place(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process"):
            run_stage(stage(), work(), tmp_path / "out", Options())
    run_stage(stage(), work(), tmp_path / "out", Options())


def test_compressed_parts_hold_the_same_records(tmp_path: Path) -> None:
    import zstandard

    plain, _ = run_stage(stage(), work(), tmp_path / "plain", Options())
    run_stage(replace(stage(), compress=True), work(), tmp_path / "zstd", Options())
    data = b"".join(
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for path in sorted((tmp_path / "zstd").glob("part-*.jsonl.zst"))
    )
    assert data == b"".join((tmp_path / "plain" / p.name).read_bytes() for p in plain.parts)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"max_reject": 1.5}, {"max_reject": -0.1}])
def test_options_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"workers|max_reject"):
        Options(**bad)


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is not wanted")
    return number


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(run_tasks(slow_square, range(12), workers)) == [n * n for n in range(12)]


def test_a_worker_that_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RunError, match=r"shard \d"):
        list(run_tasks(die_at_three, range(12), 2))


def test_an_error_in_a_worker_arrives_as_it_is() -> None:
    with pytest.raises(ValueError, match="three"):
        list(run_tasks(fail_at_three, range(12), 2))


def test_manifest_key_ignores_where_inputs_lie(tmp_path: Path) -> None:
    manifest, _ = run_stage(stage(), work(), tmp_path / "out", Options())
    moved = replace(manifest, inputs=[{**manifest.inputs[0], "path": "/other"}])
    changed = replace(manifest, inputs=[{**manifest.inputs[0], "sha256": "other"}])
    assert isinstance(manifest, Manifest)
    assert moved.key == manifest.key != changed.key
