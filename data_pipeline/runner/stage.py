"""Runs a stage: shards of work in parallel, each document accounted for.

A stage is a pure function from a shard's documents to records and rejects; it is sharded by file,
so the output does not depend on how many processes or machines work on it (`executors.py`) or in
which order they finish. The engine counts what goes in and what comes out on both sides of the
function and refuses to publish when a document is missing: in = out + rejected.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.records.jsonl import LineWriter
from data_pipeline.records.record import Json, Lineage, Record, Reject, digest, record_line
from data_pipeline.runner.executors import Executor, LocalExecutor, run_shards
from data_pipeline.runner.options import RecordsOutput
from data_pipeline.runner.output import (
    MANIFEST_NAME,
    Manifest,
    OtherOutput,
    WorkDirectory,
    check_target,
    finish_shard,
    number_parts,
    read_manifest,
    stage_key,
    start_shard,
    write_manifest,
)
from megaphi.durable import rename_durably
from megaphi.errors import RunError, TooManyRejects

IDENTITIES_NAME = "identities"  # in a shard's directory
PART_BYTES = 32 * 2**20  # a part file is closed once it has grown to this, before compression


@dataclass
class Tally:
    """What a shard has read, counted where it is read and not where it is written.

    Attributes:
        records_in: documents read.
        inputs: what identifies them, for `Work.describe`.
        notes: what the stage wants to say about the shard as a whole, for `Work.finish`.
        identities: of the records read, for `Work.check`.
    """

    records_in: int = 0
    inputs: list[Json] = field(default_factory=list)
    notes: list[Json] = field(default_factory=list)
    identities: bytearray = field(default_factory=bytearray)


class ShardFunction(Protocol):
    """The work of a stage on one shard: a module-level function, so that it can be sent.

    It counts each document in `tally.records_in` as it is read, before anything can be lost.
    """

    def __call__(self, shard: Any, config: Any, tally: Tally) -> Iterator[Record | Reject]:
        """Yield, for each document of the shard, the record that is kept or the reject."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage and its configuration.

    Attributes:
        name: as in `megaphi data NAME`.
        version: raised when the same input would give another output.
        config: every option that the output depends on; JSON.
        function: the work on one shard.
        notes: what the stage changes in every text, for the manifest.
        compress: write parts as `.jsonl.zst`.
    """

    name: str
    version: str
    config: dict[str, Json]
    function: ShardFunction
    notes: tuple[str, ...] = ()
    compress: bool = False

    @property
    def lineage(self) -> Lineage:
        """The entry that this stage appends to the lineage of each record that it keeps."""
        return Lineage(stage=self.name, version=self.version, config=digest(self.config)[:12])


class _PartWriter:
    """Writes a shard's lines to files that roll over at `PART_BYTES`."""

    def __init__(self, directory: Path, kind: str, suffix: str) -> None:
        self._directory = directory
        self._kind = kind
        self._suffix = suffix
        self._open: LineWriter | None = None
        self._files: list[LineWriter] = []

    def write(self, line: bytes) -> None:
        if self._open is None:
            name = f"{self._kind}-{len(self._files):05d}{self._suffix}"
            self._open = LineWriter(self._directory / name)
            self._files.append(self._open)
        self._open.write(line)
        if self._open.text_bytes >= PART_BYTES:
            self.close()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def entries(self) -> list[dict[str, Json]]:
        """The files written, as `PartFile` fields."""
        return [
            {
                "name": file.path.name,
                "records": file.lines,
                "bytes": file.path.stat().st_size,
                "sha256": file.sha256,
            }
            for file in self._files
        ]


def _run_shard(task: tuple[Stage, Any, Path]) -> dict[str, Json]:
    """Run one shard and leave its files and its result in its directory."""
    stage, shard, directory = task
    attempt = start_shard(directory)
    tally, lineage = Tally(), stage.lineage
    rejected: Counter[str] = Counter()
    records_out = text_bytes = 0
    parts = _PartWriter(attempt, "part", ".jsonl.zst" if stage.compress else ".jsonl")
    rejects = _PartWriter(attempt, "rejected", ".jsonl")
    try:
        for outcome in stage.function(shard, stage.config, tally):
            if isinstance(outcome, Reject):
                rejected[outcome.reason] += 1
                rejects.write(outcome.line())
            else:
                outcome["lineage"] = [*outcome.get("lineage", []), lineage]
                records_out += 1
                text_bytes += len(outcome["text"].encode("utf-8"))
                parts.write(record_line(outcome))
    finally:
        parts.close()
        rejects.close()
    (attempt / IDENTITIES_NAME).write_bytes(tally.identities)
    result: dict[str, Json] = {
        "records_in": tally.records_in,
        "records_out": records_out,
        "reasons": dict(rejected),
        "text_bytes": text_bytes,
        "inputs": tally.inputs,
        "notes": tally.notes,
        "part": parts.entries(),
        "rejected": rejects.entries(),
    }
    return finish_shard(attempt, directory, result)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the named distributions that are installed."""
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage works on.

    Attributes:
        shards: the arguments of the shard function, in the order of the output.
        fingerprint: a cheap identity of the inputs (names, sizes, times), by which a killed run
            is known again; JSON.
        describe: from what each shard's `Tally.inputs` recorded, the manifest's `inputs`.
        identify: the same without running the stage, by reading the inputs; called when a
            finished output may be reused.
        prepare: called before the first shard, by the one process that holds the output's lock,
            and not when a finished output is reused.
        finish: called with the work directory and each shard's `Tally.notes`, in order, before
            the output is published; it may put reports alongside the parts.
        check: called with the directories of all shards once they are done; may refuse to go on.
    """

    shards: Sequence[Any]
    fingerprint: Json
    describe: Callable[[list[list[Json]]], list[dict[str, Json]]]
    identify: Callable[[], list[dict[str, Json]]]
    prepare: Callable[[], None] = lambda: None
    finish: Callable[[Path, list[list[Json]]], None] = lambda directory, notes: None
    check: Callable[[list[Path]], None] = lambda shards: None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a stage is run; nothing here changes its output.

    Attributes:
        workers: number of processes on this machine, where `executor` is not given.
        executor: how shards are run; None for processes on this machine.
        max_reject: largest share of refused documents, 0 to 1, at which the output is published.
        overwrite: replace an output that was made from other inputs or options.
        libraries: distributions whose versions the manifest records.
        on_shard: called after each shard with (shards done, shards in all).
    """

    workers: int = 1
    executor: Executor | None = None
    max_reject: float = RecordsOutput.max_reject
    overwrite: bool = False
    libraries: tuple[str, ...] = ()
    on_shard: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"`workers` {self.workers}: at least 1 is needed")
        if not 0 <= self.max_reject <= 1:
            raise ValueError(f"`max_reject` {self.max_reject}: must be a share from 0 to 1")

    @property
    def runner(self) -> Executor:
        """How shards are run."""
        return self.executor or LocalExecutor(self.workers)


def run_stage(stage: Stage, work: Work, out: Path, options: Options) -> tuple[Manifest, bool]:
    """Run a stage into a records directory.

    Args:
        stage: the stage.
        work: its inputs.
        out: the records directory to make.
        options: workers, limits.

    Returns:
        The manifest, and whether a finished output was reused.

    Raises:
        ValueError: `out` holds something else and `overwrite` is not set.
        TooManyRejects: more than `max_reject` was refused; the output is in `OUT.rejected`.
        RunError: nothing was kept, a document is unaccounted for, or a worker died.
        ShardsLeft: the executor leaves shards to others.
    """
    reusable = _reusable(stage, work, out, options)
    if reusable is not None:
        return reusable, True
    started = time.monotonic()
    plan = digest([stage.name, stage.version, stage.config, stage.compress, None, work.fingerprint])
    allowed = None if options.overwrite else _set_aside(plan, out, options)
    if allowed is not None:
        return allowed, True
    partial = out.with_name(out.name + ".partial")
    directory = WorkDirectory(partial, plan, shared=options.runner.shared)
    try:
        work.prepare()
        results = _run_shards(stage, work, directory, options)
        work.check([directory.shard_directory(index) for index in range(len(results))])
        manifest = _gather(stage, work, directory, results)
        work.finish(directory.path, [result.get("notes", []) for result in results])
        run = {
            "seconds": round(time.monotonic() - started, 3),
            "engine": options.runner.name,
            "workers": options.runner.workers,
            "resumed": directory.resumed,
            "plan": plan,
            "versions": library_versions(options.libraries),
        }
        manifest = replace(manifest, run=run)
        write_manifest(directory.path, manifest)
        _publish(directory, manifest, out, options)
    except BaseException:
        directory.release()
        raise
    return manifest, False


def _reusable(stage: Stage, work: Work, out: Path, options: Options) -> Manifest | None:
    """The manifest of a finished output of the same inputs and options, None to build anew."""
    check_target(out)
    if not (out / MANIFEST_NAME).is_file() or options.overwrite:
        return None
    manifest = read_manifest(out)
    compressed = all(part.name.endswith(".zst") for part in manifest.parts)
    # Comparing the options first saves reading the inputs.
    if compressed == stage.compress and manifest.key == stage_key(
        stage.name, stage.version, stage.config, None, manifest.inputs
    ):
        inputs = work.identify()
        if manifest.key == stage_key(stage.name, stage.version, stage.config, None, inputs):
            return manifest
    raise OtherOutput(
        f"{out}: holds the output of other inputs or options; "
        "choose another `out`, or set `overwrite` to replace it"
    )


def _run_shards(
    stage: Stage, work: Work, directory: WorkDirectory, options: Options
) -> list[dict[str, Json]]:
    """Run the shards that are not done yet; return all results in order."""
    tasks = [
        (stage, shard, directory.shard_directory(index)) for index, shard in enumerate(work.shards)
    ]
    complete = run_shards(_run_shard, tasks, directory, options.runner, options.on_shard)
    for index, result in enumerate(complete):
        accounted = result["records_out"] + sum(result["reasons"].values())
        if result["records_in"] != accounted:
            raise RunError(
                f"{stage.name}: shard {index} read {result['records_in']} documents but kept or "
                f"rejected {accounted}; this is a fault of the stage, nothing was published"
            )
    return complete


def _gather(
    stage: Stage,
    work: Work,
    directory: WorkDirectory,
    results: list[dict[str, Json]],
) -> Manifest:
    """Number the shards' files through and sum up their counts."""
    reasons: Counter[str] = Counter()
    for result in results:
        reasons.update(result["reasons"])
    parts = number_parts(directory, results, "part")
    rejects = number_parts(directory, results, "rejected")
    return Manifest(
        stage=stage.name,
        version=stage.version,
        config=stage.config,
        seed=None,
        inputs=work.describe([result["inputs"] for result in results]),
        records_in=sum(result["records_in"] for result in results),
        records_out=sum(result["records_out"] for result in results),
        rejected=dict(sorted(reasons.items())),
        text_bytes=sum(result["text_bytes"] for result in results),
        notes=list(stage.notes),
        parts=parts,
        rejects=rejects,
    )


def _aside(out: Path) -> Path:
    return out.with_name(out.name + ".rejected")


def _is_allowed(manifest: Manifest, options: Options) -> bool:
    share = manifest.num_rejected / max(manifest.records_in, 1)
    return manifest.records_out > 0 and share <= options.max_reject


def _set_aside(plan: str, out: Path, options: Options) -> Manifest | None:
    """Publish what an earlier run of the same plan set aside and `max_reject` allows now.

    Returns:
        Its manifest; None where there is no such output.
    """
    aside = _aside(out)
    if not (aside / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(aside)
    except RunError:  # somebody has cleared it away in part; it is made again
        return None
    if manifest.run.get("plan") != plan or not _is_allowed(manifest, options):
        return None
    rename_durably(aside, out)
    return manifest


def _publish(directory: WorkDirectory, manifest: Manifest, out: Path, options: Options) -> None:
    """Publish the output, or set it aside as `OUT.rejected` when too much was refused."""
    share = manifest.num_rejected / max(manifest.records_in, 1)
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.rejected.items())
    if _is_allowed(manifest, options):
        directory.publish(out)
        return
    aside = _aside(out)
    check_target(aside)
    directory.publish(aside)
    if share > options.max_reject:
        raise TooManyRejects(
            f"{manifest.num_rejected} of {manifest.records_in} documents were rejected "
            f"({reasons}), more than `max_reject` {options.max_reject:g} allows; see {aside}, "
            "which a run with a higher `max_reject` takes as it is"
        )
    raise RunError(
        f"no document was kept of {manifest.records_in} ({reasons or 'the input is empty'}); "
        f"see {aside}"
    )


def finished_output(
    stage: Stage, inputs: list[dict[str, Json]], out: Path, overwrite: bool
) -> Manifest | None:
    """The manifest of a finished output of the same inputs and options, else None.

    Looked up before anything is asked, so that a finished run never pays again.

    Raises:
        ValueError: `out` holds the output of other inputs or options.
    """
    if overwrite or not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out)
    if manifest.key != stage_key(stage.name, stage.version, stage.config, None, inputs):
        raise OtherOutput(
            f"{out}: holds the output of other inputs or options, or a partial one; "
            "choose another `out`, or set `overwrite` to replace it"
        )
    return manifest
