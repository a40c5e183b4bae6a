"""The filter stage: every document gets a score, and the educational ones are kept.

A first pass scores the documents part by part; then the threshold is fixed (given, or read off the
held-out precision, or such that the best documents fill a budget of tokens) and the distribution
of the scores is compared with that of the training sample; a second pass writes the records.

Each record gets `quality`: `{"score": probability, "filter": digest}`; what an annotator said of it
moves to `quality.annotation`. Rejects are `low_score`, with score and threshold, and `no_score`
where the features are not finite. `drift.json` is alongside the parts.

Memory: about 40 bytes a document. Output does not depend on the number of workers.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.quality.embeddings import model_spec
from data_pipeline.quality.features import BATCH_DOCUMENTS, HASHED, open_features
from data_pipeline.quality.forest import Forest, Scores, load_forest
from data_pipeline.quality.metrics import drift, threshold_for_precision
from data_pipeline.quality.options import FilterRun, Selection
from data_pipeline.quality.train_filter import FOREST_NAME, REPORT_NAME, STAGE, TRAINING_NAME
from data_pipeline.records.record import Json, Record, Reject, digest
from data_pipeline.runner.executors import run_shards
from data_pipeline.runner.finished import Finished, Show, finished_records, run_options
from data_pipeline.runner.first_phase import FirstPhase, run_with_first_phase
from data_pipeline.runner.output import (
    MANIFEST_NAME,
    Manifest,
    WorkDirectory,
    finish_shard,
    start_shard,
    write_json,
)
from data_pipeline.runner.record_work import PartShard, broken_text, read_shard, record_work
from data_pipeline.runner.stage import Options, Stage, Tally
from data_pipeline.similarity.digest import text_digest
from data_pipeline.similarity.shingles import mix
from megaphi.durable import file_sha256
from megaphi.errors import RunError

VERSION = "1"
DRIFT_NAME = "drift.json"


@dataclass(frozen=True)
class Filter:
    """A filter directory: its files' SHA-256, its features' description, its report, its digest."""

    directory: Path
    files: dict[str, str]
    spec: dict[str, Json]
    report: dict[str, Json]
    digest: str

    def forest(self) -> Forest:
        """The forest; `RunError` where the file is another one."""
        return load_forest(self.directory / FOREST_NAME, self.files[FOREST_NAME])

    def training_texts(self) -> set[bytes]:
        """Digests of the texts that the forest was trained on.

        Raises:
            RunError: the file is another one.
        """
        path = self.directory / TRAINING_NAME
        _check_file(path, self.files[TRAINING_NAME])
        return {row.tobytes() for row in np.load(path, allow_pickle=False)}


@dataclass(frozen=True)
class _ScoreTask:
    shard: PartShard
    directory: Path
    filter: Filter


@dataclass(frozen=True)
class FilterShard:
    """A part of the records, and the file of what was decided on its documents."""

    part: PartShard
    decisions: Path
    filter_digest: str


def load_filter(directory: Path, model: Path | None = None) -> Filter:
    """Read a filter directory.

    Args:
        directory: as `megaphi data train-filter` made it.
        model: where the embedding model is now; None for where it was at the training.

    Raises:
        FileNotFoundError: there is no filter, or no model.
        ValueError: the model is another one than the filter was trained with.
        RunError: the filter is damaged.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: no filter there; make one with `megaphi data train-filter`"
        )
    try:
        manifest = json.loads(path.read_bytes())
        stage, spec, files = manifest["stage"], manifest["features"], manifest["files"]
        files = {name: files[name] for name in (FOREST_NAME, REPORT_NAME, TRAINING_NAME)}
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: not the manifest of a filter ({error})") from None
    if stage != STAGE:
        raise ValueError(f"{directory}: holds the output of {stage}, not a filter")
    report = directory / REPORT_NAME
    _check_file(report, files[REPORT_NAME])
    if spec["kind"] == HASHED and model is not None:
        raise ValueError("`model`: this filter was trained on hashed features")
    if spec["kind"] != HASHED:
        found = model_spec(model or Path(spec["path"]), spec["max_tokens"])
        if found["sha256"] != spec["sha256"]:
            raise ValueError(
                f"{found['path']}: not the model that the filter was trained with; name that one "
                "as `model`, or train again"
            )
        spec = found
    identity = digest([manifest["version"], manifest["key"], files])[:12]
    return Filter(directory, files, spec, json.loads(report.read_bytes()), identity)


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file() or file_sha256(path) != sha256:
        raise RunError(f"{path}: missing or differs from its manifest (SHA-256); train it again")


def filter_run(run: FilterRun, show: Show) -> Finished:
    """Filter as the user's options say; see `load_filter` and `filter_records`."""
    started = time.monotonic()
    quality_filter = load_filter(run.filter, run.model)
    manifest, reused, drift = filter_records(
        run.records,
        quality_filter,
        run.output.out,
        run.options,
        run_options(run.output, run.engine, show, ("numpy", "scikit-learn")),
        compress=run.output.zstd,
    )
    done = finished_records(run.output.out, manifest, reused, started)
    line = (
        f"{done.line} | threshold {drift['threshold']:g}, about {drift['kept_tokens']} of "
        f"{drift['tokens']} tokens | scores {drift['verdict']} (PSI {drift['psi']:.3f})"
    )
    if drift["verdict"] == "drift":
        line += ": unlike the training sample, label some of these records and train again"
    wanted = run.options.keep_tokens
    if wanted is not None and drift["tokens"] < wanted:
        line += f" | fewer than the {wanted} asked for: all are kept"
    return Finished(done.result | {"drift": drift}, line)


def filter_records(
    records: Sequence[Path],
    quality_filter: Filter,
    out: Path,
    selection: Selection,
    options: Options,
    *,
    compress: bool = False,
) -> tuple[Manifest, bool, dict[str, Json]]:
    """Filter records directories into one.

    Args:
        records: records directories; the order of the output is theirs.
        quality_filter: see `load_filter`.
        out: records directory to make.
        selection: which documents are kept.
        options: see `run_stage`.
        compress: write `.jsonl.zst` parts.

    Returns:
        The manifest, whether a finished output was reused, and the content of `drift.json`.

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: an option is wrong, the precision is out of reach, or `out` holds something
            else.
        RunError: the records are damaged, the scores drifted too far, or see `run_stage`.
    """
    threshold = selection.threshold
    if selection.precision is not None:
        curve = quality_filter.report["curve"]
        threshold = threshold_for_precision(curve, selection.precision)
    config = asdict(selection) | {"filter": quality_filter.digest}
    stage = Stage(
        name="filter", version=VERSION, config=config, function=filter_shard, compress=compress
    )
    place = out.with_name(out.name + ".scores.partial")
    work = record_work(records)
    parts: list[PartShard] = list(work.shards)

    def decide(scored: WorkDirectory) -> None:
        directories = [scored.shard_directory(part.index) for part in parts]
        tasks = [
            _ScoreTask(part, directory, quality_filter)
            for part, directory in zip(parts, directories, strict=True)
        ]
        run_shards(_score_part, tasks, scored, options.runner, options.on_shard)
        _decide(directories, place, selection, threshold, quality_filter.report["reference"])

    plan = [VERSION, quality_filter.digest, work.fingerprint]
    first = FirstPhase(directory=place, plan=plan, run=decide)
    work = replace(
        work,
        shards=[
            FilterShard(part, place / f"decisions-{part.index:05d}.npz", quality_filter.digest)
            for part in parts
        ],
        finish=lambda directory, notes: write_json(
            directory / DRIFT_NAME, json.loads((place / DRIFT_NAME).read_bytes())
        ),
    )
    manifest, reused = run_with_first_phase(stage, work, out, options, first)
    return manifest, reused, json.loads((out / DRIFT_NAME).read_bytes())


def _score_part(task: _ScoreTask) -> dict[str, Json]:
    """Write `scores.npy`, `bytes.npy` and `trained.npy` (seen in training), [d] each, of a part."""
    attempt = start_shard(task.directory)
    features, forest = open_features(task.filter.spec), task.filter.forest()
    scores: list[Scores] = [np.zeros(0)]
    training = task.filter.training_texts()
    sizes: list[int] = []
    trained: list[bool] = []
    texts: list[str] = []
    for _, record in read_shard(task.shard, Tally()):
        # A half character cannot be written; the second pass rejects its record.
        data = record["text"].encode("utf-8", "replace")
        sizes.append(len(data))
        trained.append(text_digest(data) in training)
        texts.append(data.decode("utf-8"))
        if len(texts) == BATCH_DOCUMENTS:
            scores.append(forest.positive_share(features(texts)))
            texts = []
    if texts:
        scores.append(forest.positive_share(features(texts)))
    np.save(attempt / "scores.npy", np.round(np.concatenate(scores), 6))
    np.save(attempt / "bytes.npy", np.array(sizes, np.int64))
    np.save(attempt / "trained.npy", np.array(trained, np.bool_))
    files = [{"name": f"{name}.npy"} for name in ("scores", "bytes", "trained")]
    return finish_shard(attempt, task.directory, {"part": files, "rejected": []})


def _decide(
    directories: list[Path],
    place: Path,
    selection: Selection,
    threshold: float | None,
    reference: dict[str, list[float]],
) -> None:
    """Fix the threshold, check for drift, and write each part's decisions."""
    parts = [np.load(directory / "scores.npy") for directory in directories]
    scores: Scores = np.concatenate(parts)
    sizes = np.concatenate([np.load(directory / "bytes.npy") for directory in directories])
    known = np.isfinite(scores)
    # A forest is surer of the documents that it was trained on than the reference is.
    trained = np.concatenate([np.load(directory / "trained.npy") for directory in directories])
    fresh = known & ~trained
    compared = fresh if fresh.any() else known
    found = drift(reference, scores[compared])
    above = found["psi"] - found["expected"]
    if selection.max_drift is not None and above > selection.max_drift:
        raise RunError(
            f"the scores drifted from those of the training sample: population stability index "
            f"{found['psi']:.3f}, {above:.3f} above chance, more than `max_drift` "
            f"{selection.max_drift:g}; label a sample of these records and train again"
        )
    if threshold is None:
        assert selection.keep_tokens is not None
        budget = int(selection.keep_tokens * selection.bytes_per_token)
        kept = _best(scores, sizes, known, budget)
        threshold = float(scores[kept].min()) if kept.any() else 1.0
    else:
        kept = known & (np.nan_to_num(scores, nan=-1.0) >= threshold)
    found |= {
        "compared": int(compared.sum()),
        "threshold": threshold,
        "kept": int(kept.sum()),
        "kept_tokens": round(int(sizes[kept].sum()) / selection.bytes_per_token),
        "tokens": round(int(sizes.sum()) / selection.bytes_per_token),
    }
    write_json(place / DRIFT_NAME, found)
    start = 0
    for number, part in enumerate(parts):
        mine = kept[start : start + len(part)]
        np.savez(place / f"decisions-{number:05d}.npz", scores=part, kept=mine, at=threshold)
        start += len(part)


def _best(
    scores: Scores, sizes: NDArray[np.int64], known: NDArray[np.bool_], budget: int
) -> NDArray[np.bool_]:
    """[d] the documents of the highest scores that fit, up to the first that does not.

    Of equal scores a fixed shuffle decides, so that a budget that ends within them does not prefer
    the first files.
    """
    shuffle = mix(np.arange(len(scores), dtype=np.uint64))
    order = np.lexsort((shuffle, -np.nan_to_num(scores, nan=-1.0)))
    order = order[known[order]]
    kept = np.zeros(len(scores), np.bool_)
    kept[order[np.cumsum(sizes[order]) <= budget]] = True
    return kept


def filter_shard(
    shard: FilterShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: carry out what was decided on the documents of a part."""
    with np.load(shard.decisions, allow_pickle=False) as table:
        scores, kept, threshold = table["scores"], table["kept"], float(table["at"])
    for row, (where, record) in enumerate(read_shard(shard.part, tally)):
        broken = broken_text(where, record)
        score = float(scores[row])
        if broken is not None:
            yield broken
        elif np.isnan(score):
            yield Reject(record["id"], "no_score", "its features are not finite", where)
        elif not kept[row]:
            detail = f"score {score:.6f} below {threshold:.6f}"
            if score >= threshold:
                detail = f"score {score:.6f}, but the tokens asked for were reached"
            yield Reject(record["id"], "low_score", detail, where)
        else:
            fields = cast(dict[str, Any], record)
            quality: dict[str, Json] = {"score": score, "filter": shard.filter_digest}
            before = fields.get("quality")
            if isinstance(before, dict):
                annotation = before.get("annotation") if "filter" in before else before
                if annotation is not None:
                    quality["annotation"] = annotation
            fields["quality"] = quality
            yield record
