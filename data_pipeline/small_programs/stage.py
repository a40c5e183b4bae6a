"""The compose stage: exercises and textbook sections as records, suites as JSON lines.

Sample number i depends on (seed, options, i) alone. Shards are fixed runs of numbers, so the
records are the same for any number of workers; a killed run continues with the missing shards.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.records.jsonl import LineWriter
from data_pipeline.records.record import Json, Record, Reject, record_id
from data_pipeline.runner.finished import Finished, Show, run_planned
from data_pipeline.runner.output import OtherOutput, is_made
from data_pipeline.runner.stage import Stage, Tally, Work
from data_pipeline.small_programs.exercise import Function, write_exercise
from data_pipeline.small_programs.options import ComposeOptions, ComposeRun
from data_pipeline.small_programs.suite import make_suite, row_line
from data_pipeline.small_programs.textbook import DEEPEST, write_section
from data_pipeline.small_programs.world import Composition, World, world_of
from megaphi.durable import sync

VERSION = "1"
SHARD_SAMPLES = 2000
SOURCES = {"exercises": "exercise", "textbooks": "textbook"}


@dataclass(frozen=True)
class SampleShard:
    """The samples from `start` up to `stop`."""

    start: int
    stop: int


def compose_run(run: ComposeRun, show: Show) -> Finished:
    """Compose what the user's options say.

    Raises:
        ValueError, RunError: see `plan_compose`, `write_suite` and `run_stage`.
    """
    started = time.monotonic()
    if run.options.kind != "suite":
        planned = plan_compose(run.options)
        return run_planned(planned, run.output, run.engine, show, started=started)
    out = run.output.out
    count, sha256, reused = write_suite(run.options, out, overwrite=run.output.overwrite)
    result: dict[str, Json] = {"out": str(out), "reused": reused, "problems": count}
    line = f"{'reused' if reused else 'wrote'} {out}: {count} problems"
    return Finished(result | {"sha256": sha256}, line)


def plan_compose(options: ComposeOptions) -> tuple[Stage, Work]:
    """The stage and its work.

    Raises:
        ValueError: the kind is `suite`, which is no records; or the world is too small for the
            options.
    """
    if options.kind not in SOURCES:
        raise ValueError(f"`kind` {options.kind}: is written by write_suite")
    options = options.resolved()
    world = world_of(options.world_key())
    _among(options, world)  # fails here rather than in a worker
    stage = Stage(name="compose", version=VERSION, config=asdict(options), function=compose_shard)
    starts = range(0, options.samples, SHARD_SAMPLES)
    shards = [SampleShard(s, min(s + SHARD_SAMPLES, options.samples)) for s in starts]
    work = Work(shards=shards, fingerprint=None, describe=lambda _: [], identify=list)
    return stage, work


def compose_shard(
    shard: SampleShard, config: dict[str, Json], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: yield the records of a run of samples."""
    options = ComposeOptions(**{**config, "groups": tuple(config["groups"])})
    world = world_of(options.world_key())
    among = _among(options, world)
    for number in range(shard.start, shard.stop):
        tally.records_in += 1
        yield _record(options, world, among, number)


def _among(options: ComposeOptions, world: World) -> list[Composition]:
    """The compositions of a narrow corpus; empty where all are used."""
    if not options.compositions:
        return []
    deepest = world.depth if options.kind == "exercises" else min(world.depth, DEEPEST)
    rng = random.Random(f"{options.seed}/compositions")
    return world.distinct(options.compositions, rng, deepest)


def _record(options: ComposeOptions, world: World, among: list[Composition], number: int) -> Record:
    """The record of a sample; samples of one text differ in their numbers alone."""
    text_number = number // options.repetition
    rng = random.Random(f"{options.seed}/{options.kind}/{text_number}")
    if options.kind == "exercises":
        function = write_exercise(world, rng, wrong=options.wrong, among=among)
        text = function.text
    else:
        text, function = write_section(world, rng, among)
    source = SOURCES[options.kind]
    return Record(
        id=record_id(source, f"{options.seed}/{number}"),
        text=text,
        source=source,
        lang="python",
        meta=_meta(function, number),
    )


def _meta(function: Function, number: int) -> dict[str, Json]:
    meta: dict[str, Json] = {
        "number": number,
        "entry_point": function.name,
        "composition": [step.name for step in function.composition],
    }
    if function.written is not function.composition:
        meta["written"] = [step.name for step in function.written]
    return meta


def write_suite(options: ComposeOptions, out: Path, *, overwrite: bool) -> tuple[int, str, bool]:
    """Write a suite as JSON lines, in one step.

    Returns:
        The number of problems, the SHA-256 of the file, and whether it was there already.

    Raises:
        ValueError: the world has too few problems, or another file has that name.
    """
    if out.is_dir():
        raise ValueError(f"{out}: is a directory; name the file of the suite")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        with LineWriter(partial) as writer:
            for row in make_suite(options):
                writer.write(row_line(row))
        same = is_made(out, writer.sha256, "suite", overwrite=overwrite)
    except (OtherOutput, ValueError):
        partial.unlink()
        raise
    partial.replace(out)
    sync(out.parent)
    return writer.lines, writer.sha256, same


def samples_of(options: ComposeOptions) -> Iterator[dict[str, Any]]:
    """The texts of a corpus without files, for whoever composes in memory."""
    options = options.resolved()
    world = world_of(options.world_key())
    among = _among(options, world)
    for number in range(options.samples):
        yield dict(_record(options, world, among, number))
