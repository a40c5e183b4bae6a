"""Builds the corpus report: scans the parts on a pool, measures, writes `report.json` and the page.

The output directory holds `manifest.json`, `report.json` and `report.html`; it is built aside and
published by one rename, and a killed run finds the parts that were scanned.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.records.record import Json, digest
from data_pipeline.report.measures import LEVELS, Scanned, corpus_measures
from data_pipeline.report.options import ReportRun
from data_pipeline.report.page import render
from data_pipeline.report.scan import ScanTask, sample_rate, scan_part
from data_pipeline.runner.executors import Executor, LocalExecutor, executor_of, run_shards
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import (
    MANIFEST_NAME,
    OtherOutput,
    WorkDirectory,
    check_target,
    write_json,
)
from data_pipeline.runner.record_work import PartShard, read_manifests, record_work
from data_pipeline.similarity.minhash import choose_bands
from megaphi.durable import file_sha256, write_durably
from megaphi.errors import RunError

VERSION = "1"
STAGE = "report"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
MAX_NGRAMS = 8_000_000  # held in memory, about 60 bytes each while they are counted


@dataclass(frozen=True)
class Corpus:
    """One corpus of the report: what it is called, and its records directories."""

    label: str
    records: Sequence[Path]


def report_run(run: ReportRun, show: Show) -> Finished:
    """Report as the user's options say; see `build_report`."""
    started, out = time.monotonic(), run.output.out
    corpora = [Corpus("corpus", run.records)]
    if run.before:
        corpora = [Corpus("before", run.before), Corpus("after", run.records)]
    report, reused = build_report(
        corpora,
        out,
        examples=run.examples,
        executor=executor_of(run.engine),
        overwrite=run.output.overwrite,
        on_part=show,
    )
    seconds = time.monotonic() - started
    summaries = [_summary(corpus) for corpus in report["corpora"]]
    told = "; ".join(
        f"{s['label']}: {s['documents']} documents, {s['bytes'] / 1e6:.1f} MB, compresses "
        f"{s['compression_ratio']:.2f}x, {s['near_duplicate_share']:.1%} near copies"
        for s in summaries
    )
    did = "reused" if reused else "wrote"
    return Finished(
        {"out": str(out), "reused": reused, "corpora": summaries, "seconds": round(seconds, 3)},
        f"{did} {out / PAGE_NAME} | {told} | {seconds:.1f} s",
    )


def _summary(corpus: dict[str, Json]) -> dict[str, Json]:
    """What the result says of a corpus of the report."""
    near = next(e for e in corpus["near_duplicates"] if e["jaccard"] == 0.85)
    return {
        "label": corpus["label"],
        "documents": corpus["documents"],
        "bytes": corpus["bytes"],
        "compression_ratio": corpus["compression"]["ratio"],
        "near_duplicate_share": near["redundant_share"],
        "skeleton_unique_share": corpus["skeletons"]["documents"]["unique_share"],
        "shared_ngrams": corpus["ngrams"]["mean_share"],
    }


def build_report(
    corpora: Sequence[Corpus],
    out: Path,
    *,
    examples: int = ReportRun.examples,
    workers: int = 1,
    executor: Executor | None = None,
    overwrite: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Json], bool]:
    """Build a report directory.

    Args:
        corpora: one, or two to compare: before and after.
        out: directory to make.
        examples: documents of each corpus that the page quotes.
        workers: number of processes on this machine, where `executor` is not given.
        executor: how parts are scanned; the output does not depend on it.
        overwrite: replace a report of other records or options.
        on_part: called after each part with (parts done, parts in all).

    Returns:
        The content of `report.json`, and whether it was there already.

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: an option is wrong, or `out` holds something else.
        RunError: the records are damaged, or there are none.
        ShardsLeft: the executor leaves parts to others.
    """
    if workers < 1 or examples < 1:
        raise ValueError(f"`workers` {workers}, `examples` {examples}: at least 1 is needed")
    check_target(out)
    inputs: list[Json] = []
    rates: list[int] = []
    for corpus in corpora:
        manifests = read_manifests(corpus.records)
        if not sum(manifest.records_out for manifest in manifests):
            raise RunError(f"{', '.join(map(str, corpus.records))}: there is no record to report")
        inputs.append([corpus.label, [manifest.records_sha256 for manifest in manifests]])
        text_bytes = sum(manifest.text_bytes for manifest in manifests)
        rates.append(sample_rate(text_bytes, MAX_NGRAMS))
    key = digest([STAGE, VERSION, examples, inputs])
    if (out / MANIFEST_NAME).is_file() and not overwrite:
        if json.loads((out / MANIFEST_NAME).read_bytes()).get("key") != key:
            raise OtherOutput(
                f"{out}: holds the output of other inputs or options; "
                "choose another `out`, or set `overwrite` to replace it"
            )
        report: dict[str, Json] = json.loads((out / REPORT_NAME).read_bytes())
        return report, True
    executor = executor or LocalExecutor(workers)
    work = WorkDirectory(out.with_name(out.name + ".partial"), key, shared=executor.shared)
    try:
        report = _measure(corpora, rates, work, examples, executor, on_part)
        write_json(work.path / REPORT_NAME, report)
        write_durably(work.path / PAGE_NAME, render(report))
        files = {name: file_sha256(work.path / name) for name in (REPORT_NAME, PAGE_NAME)}
        manifest = {"stage": STAGE, "version": VERSION, "key": key, "inputs": inputs}
        write_json(work.path / MANIFEST_NAME, manifest | {"files": files})
        work.publish(out)
    finally:
        work.release()
    return report, False


def _measure(
    corpora: Sequence[Corpus],
    rates: Sequence[int],
    work: WorkDirectory,
    examples: int,
    executor: Executor,
    on_part: Callable[[int, int], None],
) -> dict[str, Json]:
    """Scan what is not scanned yet, and measure each corpus."""
    bands, rows = choose_bands(min(LEVELS))
    tasks: list[list[ScanTask]] = []
    number = 0
    for corpus, rate in zip(corpora, rates, strict=True):
        shards: list[PartShard] = list(record_work(corpus.records).shards)
        places = [work.shard_directory(number + place) for place in range(len(shards))]
        number += len(shards)
        tasks.append(
            [
                ScanTask(shard, place, bands, rows, rate, examples)
                for shard, place in zip(shards, places, strict=True)
            ]
        )
    everything = [task for some in tasks for task in some]
    scans = run_shards(scan_part, everything, work, executor, on_part)
    measured = []
    number = 0
    for corpus, rate, some in zip(corpora, rates, tasks, strict=True):
        results = scans[number : number + len(some)]
        number += len(some)
        scanned = Scanned([task.directory for task in some], results)
        measures = corpus_measures([task.shard for task in some], scanned, bands, rate)
        measured.append({"label": corpus.label, **measures})
    return {"version": VERSION, "corpora": measured}
