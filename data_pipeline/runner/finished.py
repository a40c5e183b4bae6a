"""What a stage did, for a program and for a person, and how a stage over records says it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.records.record import Json
from data_pipeline.runner.executors import executor_of
from data_pipeline.runner.options import EngineOptions, PartsOutput
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, Stage, Work, run_stage

Show = Callable[[int, int | None], None]
"""Shows progress: (done, total), where a total of None is not known."""


@dataclass(frozen=True)
class Finished:
    """What a stage did.

    Attributes:
        result: a JSON object.
        line: the same for a person, mostly one line.
    """

    result: dict[str, Json]
    line: str


def run_options(
    output: PartsOutput, engine: EngineOptions, show: Show, libraries: tuple[str, ...] = ()
) -> Options:
    """How `run_stage` is to run a stage, as the user's options say."""
    return Options(
        executor=executor_of(engine),
        max_reject=output.max_reject,
        overwrite=output.overwrite,
        libraries=libraries,
        on_shard=show,
    )


def run_planned(
    planned: tuple[Stage, Work],
    output: PartsOutput,
    engine: EngineOptions,
    show: Show,
    *,
    libraries: tuple[str, ...] = (),
    started: float,
) -> Finished:
    """Run a stage as the user's options say.

    Args:
        planned: the stage and its work.
        output: where the records go.
        engine: where shards run.
        show: shows the progress, in parts.
        libraries: distributions whose versions the manifest records.
        started: `time.monotonic()` at the start.

    Raises:
        ValueError, RunError, ShardsLeft: see `run_stage`.
    """
    stage, work = planned
    stage = replace(stage, compress=output.zstd)
    manifest, reused = run_stage(
        stage, work, output.out, run_options(output, engine, show, libraries)
    )
    return finished_records(output.out, manifest, reused, started)


def finished_records(out: Path, manifest: Manifest, reused: bool, started: float) -> Finished:
    """What to say of a records directory.

    Args:
        out: the directory.
        manifest: of it.
        reused: it was there already.
        started: `time.monotonic()` at the start.
    """
    seconds = max(time.monotonic() - started, 1e-9)
    result = {
        "out": str(out),
        "reused": reused,
        "records_in": manifest.records_in,
        "records_out": manifest.records_out,
        "rejected": manifest.rejected,
        "text_bytes": manifest.text_bytes,
        "records_sha256": manifest.records_sha256,
        "seconds": round(seconds, 3),
    }
    line = (
        f"{'reused' if reused else 'wrote'} {out}: {manifest.records_out} records, "
        f"{manifest.text_bytes / 1e6:.1f} MB | {reasons(manifest.rejected)} of "
        f"{manifest.records_in} | {seconds_and_rate(started, manifest.text_bytes)}"
    )
    return Finished(result, line)


def seconds_and_rate(started: float, size: int) -> str:
    """`1.2 s, 25.3 MB/s` since `started` for `size` bytes."""
    seconds = max(time.monotonic() - started, 1e-9)
    return f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"


def reasons(rejected: dict[str, int]) -> str:
    """`12 rejected (empty 10, utf8 2)`."""
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} rejected" + (f" ({counts})" if counts else "")
