"""Train the quality filter: labels, features, a random forest, and how far it can be trusted.

The labels are records whose `quality.score` was given by `megaphi data annotate` (or by hand); the
texts are those of the corpus to be filtered, found by record id. A record of another text than the
one that was labelled stops the training. The split into training and held-out documents goes by a
hash of the text, so that copies of a document fall on the same side and a rerun draws the same
split.

The output directory holds `manifest.json`, `forest.npz`, `report.json`, `report.txt`, and
`training.npy`, by which the drift check leaves out the documents that the forest was trained on.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.quality.features import BATCH_DOCUMENTS, feature_spec, open_features, sklearn
from data_pipeline.quality.forest import Matrix, from_sklearn
from data_pipeline.quality.metrics import (
    Labels,
    average_precision,
    best_f1,
    confusion,
    precision_recall,
    reference_bins,
)
from data_pipeline.quality.options import TrainFilterRun, TrainingOptions
from data_pipeline.records.record import Json, digest
from data_pipeline.runner.executors import Executor, LocalExecutor, cores, executor_of, run_shards
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import (
    MANIFEST_NAME,
    OtherOutput,
    WorkDirectory,
    check_target,
    finish_shard,
    start_shard,
    write_json,
)
from data_pipeline.runner.record_work import PartShard, read_manifests, read_shard, record_work
from data_pipeline.runner.stage import Tally
from data_pipeline.similarity.digest import text_digest
from megaphi.durable import file_sha256, sync
from megaphi.errors import RunError

VERSION = "1"
STAGE = "train-filter"
FOREST_NAME = "forest.npz"
REPORT_NAME = "report.json"
TEXT_NAME = "report.txt"
FEATURES_NAME = "features.npy"
TRAINING_NAME = "training.npy"  # digests of the texts that the forest knows by heart
MIN_OF_A_CLASS = 5  # documents of each class, on each side of the split


@dataclass(frozen=True)
class TrainedFilter:
    """What `train_filter` did: whether the output was there already, and its `report.json`."""

    reused: bool
    report: dict[str, Json]


@dataclass(frozen=True)
class _FeatureTask:
    """One part of the corpus, the ids that have labels, and where its features go."""

    shard: PartShard
    labels: frozenset[str]
    spec: dict[str, Json]
    directory: Path


@dataclass(frozen=True)
class _Sample:
    """The labelled documents: features [d, f], labels [d], digests of the texts, and sources."""

    features_df: Matrix
    labels: Labels
    digests: list[bytes]
    sources: list[str]


def read_labels(directory: Path) -> dict[str, tuple[float, str]]:
    """The score of each labelled record and the digest of its text, by id.

    Raises:
        FileNotFoundError, RunError: the directory holds no records, or is damaged.
        ValueError: no record has a `quality.score`, it is not a number, or an id has two texts.
    """
    labels: dict[str, tuple[float, str]] = {}
    for shard in record_work([directory]).shards:
        for where, record in read_shard(shard, Tally()):
            quality = cast(dict[str, Any], record).get("quality")
            if isinstance(quality, dict) and "filter" in quality:
                quality = quality.get("annotation")  # what `megaphi data filter` put aside
            score = quality.get("score") if isinstance(quality, dict) else None
            if score is None:
                continue
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise ValueError(f"{directory}/{where}: quality.score is not a number")
            if not math.isfinite(score):
                raise ValueError(f"{directory}/{where}: quality.score is {score}")
            label = (float(score), text_digest(record["text"].encode("utf-8", "replace")).hex())
            if labels.setdefault(record["id"], label)[1] != label[1]:
                raise _two_texts(record["id"], f"{directory}/{where}")
            labels[record["id"]] = label
    if not labels:
        raise ValueError(
            f"{directory}: no record has a quality.score; make labels with `megaphi data annotate`"
        )
    return labels


def train_filter_run(run: TrainFilterRun, show: Show) -> Finished:
    """Train as the user's options say; see `train_filter`."""
    started, out, executor = time.monotonic(), run.output.out, executor_of(run.engine)
    trained = train_filter(
        run.labels,
        run.records,
        out,
        run.options,
        workers=executor.workers if executor.name == "local" else cores(),
        executor=executor,
        overwrite=run.output.overwrite,
        on_part=show,
    )
    report, seconds = trained.report, time.monotonic() - started
    best, labels = report["suggested"], report["labels"]
    names = ("labels", "documents", "roc_auc", "average_precision")
    result = {
        "out": str(out),
        "reused": trained.reused,
        **{name: report[name] for name in names},
        "suggested": best,
        "seconds": round(seconds, 3),
    }
    missing = labels["given"] - labels["found"]
    line = (
        f"{'reused' if trained.reused else 'trained'} {out}: {labels['found']} labels"
        f"{f' ({missing} not in the records)' if missing else ''} | held-out ROC AUC "
        f"{report['roc_auc']:.3f} | suggested threshold {best['threshold']:g}: precision "
        f"{best['precision']:.3f}, recall {best['recall']:.3f}, keeps {best['kept']:.1%} | "
        f"{seconds:.1f} s"
    )
    return Finished(result, line)


def _two_texts(name: str, where: str) -> ValueError:
    return ValueError(
        f"{where}: the id {name} has a label for another text; make the records again with "
        "`megaphi data ingest`, whose ids are of the text, and label them with `annotate`"
    )


def train_filter(
    labels_dir: Path,
    records: Sequence[Path],
    out: Path,
    options: TrainingOptions,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    overwrite: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedFilter:
    """Train a filter directory.

    Args:
        labels_dir: records directory with `quality.score`.
        records: records directories that hold the labelled documents.
        out: directory to make.
        options: see `TrainingOptions`.
        workers: number of processes on this machine; the output does not depend on it.
        executor: how features are computed; None for processes on this machine.
        overwrite: replace an output of other labels or options.
        on_part: called after each part of the records with (parts done, parts in all).

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: an option is wrong, labels are too few or all alike, or `out` holds something
            else.
        RunError: the records are damaged.
        ShardsLeft: the executor leaves parts to others.
    """
    check_target(out)
    spec = feature_spec(options.features, options.max_tokens)
    sklearn("ensemble")
    config = asdict(options) | {"features": {k: v for k, v in spec.items() if k != "path"}}
    inputs = [
        {"path": str(directory), "sha256": manifest.records_sha256}
        for directory, manifest in zip(
            [labels_dir, *records],
            [*read_manifests([labels_dir]), *read_manifests(records)],
            strict=True,
        )
    ]
    key = digest([STAGE, VERSION, config, [entry["sha256"] for entry in inputs]])
    finished = _finished(out, key, overwrite)
    if finished is not None:
        return TrainedFilter(True, finished)
    labels = read_labels(labels_dir)
    executor = executor or LocalExecutor(workers)
    work = WorkDirectory(out.with_name(out.name + ".partial"), key, shared=executor.shared)
    try:
        sample = _gather(labels, records, spec, options.good_from, work, executor, on_part)
        report = _fit(sample, options, work.path, workers)
        report["labels"] = {"given": len(labels), "found": len(sample.labels)}
        write_json(work.path / REPORT_NAME, report)
        manifest = {"stage": STAGE, "version": VERSION, "key": key, "config": config}
        manifest |= {"inputs": inputs, "features": spec}
        names = (FOREST_NAME, REPORT_NAME, TRAINING_NAME)
        manifest["files"] = {name: file_sha256(work.path / name) for name in names}
        (work.path / TEXT_NAME).write_text(report_text(report), encoding="utf-8")
        sync(work.path / TEXT_NAME)
        write_json(work.path / MANIFEST_NAME, manifest)
        work.publish(out)
    finally:
        work.release()
    return TrainedFilter(False, report)


def _finished(out: Path, key: str, overwrite: bool) -> dict[str, Json] | None:
    """The report of a finished output of the same inputs and options, None to build anew."""
    if not (out / MANIFEST_NAME).is_file() or overwrite:
        return None
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    if manifest.get("key") == key:
        report: dict[str, Json] = json.loads((out / REPORT_NAME).read_bytes())
        return report
    raise OtherOutput(
        f"{out}: holds the output of other inputs or options; "
        "choose another `out`, or set `overwrite` to replace it"
    )


def _gather(
    labels: dict[str, tuple[float, str]],
    records: Sequence[Path],
    spec: dict[str, Json],
    good_from: float,
    work: WorkDirectory,
    executor: Executor,
    on_part: Callable[[int, int], None],
) -> _Sample:
    """The features of the labelled documents, in the order of the records."""
    shards: list[PartShard] = list(record_work(records).shards)
    tasks = [
        _FeatureTask(shard, frozenset(labels), spec, work.shard_directory(shard.index))
        for shard in shards
    ]
    seen: set[str] = set()
    rows: list[Matrix] = []
    scores: list[float] = []
    digests: list[bytes] = []
    sources: list[str] = []
    results = run_shards(_features_of_part, tasks, work, executor, on_part)
    for task, result in zip(tasks, results, strict=True):
        features_df = np.load(task.directory / FEATURES_NAME, allow_pickle=False)
        new = []
        for place, (name, text_hash, source) in enumerate(result["found"]):
            if text_hash != labels[name][1]:
                raise _two_texts(name, f"{task.shard.directory / task.shard.part.name}")
            if name in seen:  # a document that is in two of the directories counts once
                continue
            seen.add(name)
            new.append(place)
            scores.append(labels[name][0])
            digests.append(bytes.fromhex(text_hash))
            sources.append(source)
        rows.append(features_df[new])
    if not scores:
        raise ValueError(
            f"none of the {len(labels)} labelled documents is in {', '.join(map(str, records))}: "
            "the labels are of another corpus"
        )
    positive = (np.array(scores) >= good_from).astype(np.int8)
    return _Sample(np.concatenate([r for r in rows if len(r)]), positive, digests, sources)


def _features_of_part(task: _FeatureTask) -> dict[str, Json]:
    """Write the features of a part's labelled documents; `found` has (id, text digest, source)."""
    attempt = start_shard(task.directory)
    features = open_features(task.spec)
    found: list[tuple[str, str, str]] = []
    texts: list[str] = []
    rows: list[Matrix] = []
    for _, record in read_shard(task.shard, Tally()):
        if record["id"] not in task.labels:
            continue
        data = record["text"].encode("utf-8", "replace")
        found.append((record["id"], text_digest(data).hex(), record["source"]))
        texts.append(data.decode("utf-8"))
        if len(texts) == BATCH_DOCUMENTS:
            rows.append(features(texts))
            texts = []
    if texts:
        rows.append(features(texts))
    matrix = np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)
    np.save(attempt / FEATURES_NAME, matrix, allow_pickle=False)
    files = [{"name": FEATURES_NAME}]
    return finish_shard(attempt, task.directory, {"found": found, "part": files, "rejected": []})


def _is_held_out(text_hash: bytes, options: TrainingOptions) -> bool:
    drawn = hashlib.sha256(f"{options.seed}/".encode() + text_hash).digest()[:8]
    return int.from_bytes(drawn, "big") < options.test_share * 2**64


def _fit(
    sample: _Sample, options: TrainingOptions, directory: Path, workers: int
) -> dict[str, Json]:
    """Train on one side of the split, judge on the other, write the forest; the report."""
    finite = np.asarray(np.isfinite(sample.features_df).all(axis=1))
    if not finite.all():
        raise RunError(
            f"the features of {int((~finite).sum())} of {len(finite)} labelled documents are not "
            "finite: the model overflows or is broken"
        )
    held_out = np.array([_is_held_out(text_hash, options) for text_hash in sample.digests])
    for side, rows in (("training", ~held_out), ("held-out", held_out)):
        counts = np.bincount(sample.labels[rows], minlength=2)
        if counts.min() < MIN_OF_A_CLASS:
            raise ValueError(
                f"the {side} documents have {counts[1]} labels of at least "
                f"{options.good_from:g} and {counts[0]} below; at least {MIN_OF_A_CLASS} of each "
                "are needed: label more documents, or change `good_from` or `test_share`"
            )
    model = sklearn("ensemble").RandomForestClassifier(
        n_estimators=options.trees,
        min_samples_leaf=options.min_leaf,
        random_state=options.seed,
        n_jobs=workers,
    )
    model.fit(sample.features_df[~held_out], sample.labels[~held_out])
    forest = from_sklearn(model, sample.features_df.shape[1])
    forest.save(directory / FOREST_NAME)
    known = [text_hash for text_hash, out in zip(sample.digests, held_out, strict=True) if not out]
    digests = np.frombuffer(b"".join(known), "<u8").reshape(-1, 2)
    np.save(directory / TRAINING_NAME, digests, allow_pickle=False)
    sync(directory / TRAINING_NAME)
    scores = np.round(forest.positive_share(sample.features_df[held_out]), 6)
    labels = sample.labels[held_out]
    sources = [source for source, out in zip(sample.sources, held_out, strict=True) if out]
    curve = precision_recall(scores, labels)
    best = best_f1(curve)
    sides = {"training": ~held_out, "held_out": held_out}
    return {
        "documents": {
            side: {"positive": int(sample.labels[rows].sum()), "all": int(rows.sum())}
            for side, rows in sides.items()
        },
        "roc_auc": round(float(sklearn("metrics").roc_auc_score(labels, scores)), 6),
        "average_precision": average_precision(curve),
        "suggested": {name: column[best] for name, column in curve.items()},
        "confusion": confusion(scores, labels, sources, curve["threshold"][best]),
        "curve": curve,
        "reference": reference_bins(scores),
    }


def report_text(report: dict[str, Json]) -> str:
    """The report for a person."""
    sides, best, curve = report["documents"], report["suggested"], report["curve"]
    lines = [
        f"labels: {report['labels']['given']} given, {report['labels']['found']} of them in the "
        "records",
        *(
            f"{side.replace('_', '-')} documents: {counts['all']}, {counts['positive']} positive"
            for side, counts in sides.items()
        ),
        f"held-out: ROC AUC {report['roc_auc']:.3f}, average precision "
        f"{report['average_precision']:.3f} (chance: "
        f"{sides['held_out']['positive'] / sides['held_out']['all']:.3f})",
        f"suggested threshold (largest F1): {best['threshold']:.6g}, precision "
        f"{best['precision']:.3f}, recall {best['recall']:.3f}, keeps {best['kept']:.1%}",
        "",
        "threshold  precision  recall     F1    kept",
    ]
    # At most some twenty rows; the whole curve is in report.json.
    stride = -(-len(curve["threshold"]) // 20)
    for place in range(0, len(curve["threshold"]), stride):
        row = {name: column[place] for name, column in curve.items()}
        lines.append(
            f"{row['threshold']:9.3f}  {row['precision']:9.3f}  {row['recall']:6.3f}  "
            f"{row['f1']:5.3f}  {row['kept']:6.1%}"
        )
    lines += ["", "decisions at the suggested threshold, by source"]
    for source, counts in report["confusion"].items():
        shown = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items())
        lines.append(f"  {json.dumps(source)}: {shown}")
    return "\n".join(lines) + "\n"
