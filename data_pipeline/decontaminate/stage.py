"""The decontaminate stage: documents that hold problems of a benchmark are taken out.

Tests as in phi-1's paper (section 5): a run of `ngram` words that a problem has too, in its
statement, solution or tests; and a function whose syntax tree matches a problem's solution at rate
tau (`ast_match.py`), compared with every problem exactly. Statements of fewer words than `ngram`,
but at least `SHORT_STATEMENT`, count where they stand in the document as a whole. A third test is
off unless a model is named: the distance of the embeddings of document and problem
(`embedding_distance.py`).

A document is rejected as `ngram`, as `embedding` or, at `drop_at`, as `ast`. A kept record with a
match at the lowest tau gets `decon`: `{"hits": [{"bench", "task_id", "method", "score"}]}`, so that
it can be pruned harder later without being compared again. `report.json` and `report.txt`, next to
the parts, say for each tau how many problems have a near twin among all the documents read, and how
many do not: the split of the paper's Table 3.
"""

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.decontaminate.benchmarks import Problem, load_benchmarks, problems_digest
from data_pipeline.decontaminate.embedding_distance import EmbeddingTable, embedding_spec
from data_pipeline.decontaminate.ngram_table import NgramTable
from data_pipeline.decontaminate.options import (
    DecontaminateOptions,
    DecontaminateRun,
    Fields,
)
from data_pipeline.decontaminate.report import read_report, report_text, write_reports
from data_pipeline.records.record import Json, Record, Reject
from data_pipeline.runner.disposable_worker import DisposableWorker, WorkerDied
from data_pipeline.runner.finished import Finished, Show, run_planned
from data_pipeline.runner.record_work import (
    PartShard,
    broken_text,
    read_shard,
    record_work,
)
from data_pipeline.runner.stage import Stage, Tally, Work
from data_pipeline.similarity.ast_match import match_rates, rapidfuzz
from data_pipeline.similarity.shingles import BATCH_BYTES

VERSION = "3"
MAX_HITS = 20  # kept in a record, the closest ones


@dataclass(frozen=True)
class ComparedShard:
    """A part of the records, and what it is compared with."""

    part: PartShard
    against: tuple[Path, ...]
    fields: Fields
    embedding: str  # what `embedding_spec` says, as JSON; "" without this test


def decontaminate(run: DecontaminateRun, show: Show) -> Finished:
    """Decontaminate records; the report is part of the result.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_decontaminate` and `run_stage`.
    """
    started = time.monotonic()
    planned, libraries = plan_decontaminate(run.records, run.options), ("rapidfuzz",)
    done = run_planned(planned, run.output, run.engine, show, libraries=libraries, started=started)
    report = read_report(run.output.out)
    return Finished(done.result | {"report": report}, f"{done.line}\n{report_text(report)}")


def plan_decontaminate(
    records: Sequence[Path], options: DecontaminateOptions
) -> tuple[Stage, Work]:
    """The stage and its work.

    Raises:
        FileNotFoundError: a records directory or benchmark file is missing.
        ValueError: a benchmark cannot be read, or rapidfuzz is not installed.
        RunError: the records are damaged.
    """
    problems = load_benchmarks(options.against, options.fields)
    config: dict[str, Json] = {
        "ngram": options.ngram,
        "ast": options.ast,
        "taus": list(options.tau),
        "drop_at": options.drop_at,
        "min_nodes": options.min_nodes,
    }
    if options.embedding_model is not None:
        config["embedding_distance"] = options.embedding_distance
    config["problems"] = problems_digest(problems)
    embedding = ""
    if options.embedding_model is not None:
        spec = embedding_spec(options.embedding_model, options.embedding_tokens)
        embedding = json.dumps(spec)
        config["embedding"] = {key: value for key, value in spec.items() if key != "path"}
    if options.ast:
        rapidfuzz()
    stage = Stage(
        name="decontaminate", version=VERSION, config=config, function=decontaminate_shard
    )
    work = record_work(
        records, lambda directory, notes: write_reports(directory, notes, problems, config)
    )
    shards = [
        ComparedShard(part, options.against, options.fields, embedding) for part in work.shards
    ]
    return stage, replace(work, shards=shards)


@dataclass
class _ShardCounts:
    """What one shard says for the report."""

    documents: int = 0
    not_parsed: int = 0
    functions: int = 0
    pairs: int = 0


class _Comparison:
    """The tables of a shard, and what it has found so far.

    Args:
        problems: the benchmark.
        config: the stage's configuration.
        worker: parses the documents.
        embeddings: of the problems; None without that test.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: dict[str, Any],
        worker: DisposableWorker,
        embeddings: EmbeddingTable | None,
    ) -> None:
        self._problems = problems
        self._config = config
        self._worker = worker
        self._embeddings = embeddings
        self._ngrams = _ngram_table(problems, config["ngram"]) if config["ngram"] else None
        self._lowest = min(config["taus"])
        solved = [
            i
            for i, problem in enumerate(problems)
            if config["ast"] and len(problem.nodes) >= config["min_nodes"]
        ]
        self._solved = np.array(solved, np.int64)
        self._nodes = [problems[i].nodes for i in solved]
        self.counts = _ShardCounts()
        self.unchecked: dict[int, str] = {}  # why the parser gave up, by number in the last batch
        self.best: dict[int, tuple[float, str]] = {}
        self.ngram_documents: Counter[int] = Counter()
        self.embedding_documents: Counter[int] = Counter()
        self.closest: dict[int, tuple[float, str]] = {}
        self.ast_documents: Counter[tuple[str, float]] = Counter()

    def hits(self, records: Sequence[Record]) -> list[list[dict[str, Json]]]:
        """The hits of each record, the closest first; n-grams, embeddings, then trees."""
        near = self._embedding_hits(records)
        self.unchecked = {}
        rates = self._tree_hits(records)
        shared = self._ngrams.hits([r["text"] for r in records]) if self._ngrams else None
        result = []
        for i, record in enumerate(records):
            hits = []
            if shared is not None:
                assert self._ngrams is not None
                self.ngram_documents.update(shared[i].keys())
                for number, count in sorted(shared[i].items()):
                    score = count / float(self._ngrams.totals[number])
                    hits.append(self._hit(number, "ngram", score))
            for number, distance in near[i].items():
                hits.append(self._hit(number, "embedding", distance))
            for number, rate in rates[i].items():
                if rate > self.best.get(number, (0.0, ""))[0]:
                    self.best[number] = (rate, record["id"])
                hits.append(self._hit(number, "ast", rate))
            self.ast_documents.update(
                {
                    (self._problems[number].benchmark, tau)
                    for number, rate in rates[i].items()
                    for tau in self._config["taus"]
                    if rate >= tau
                }
            )
            self.counts.documents += 1
            hits.sort(key=_rank)
            result.append(hits)
        return result

    def _hit(self, number: int, method: str, score: float) -> dict[str, Json]:
        problem = self._problems[number]
        return {
            "bench": problem.benchmark,
            "task_id": problem.task_id,
            "method": method,
            "score": round(score, 3),
        }

    def _embedding_hits(self, records: Sequence[Record]) -> list[dict[int, float]]:
        """For each record, the distance of each problem that is near it."""
        if self._embeddings is None:
            return [{} for _ in records]
        near = self._embeddings.near(
            [record["text"] for record in records], self._config["embedding_distance"]
        )
        for record, found in zip(records, near, strict=True):
            self.embedding_documents.update(found.keys())
            for number, distance in found.items():
                if distance < self.closest.get(number, (np.inf, ""))[0]:
                    self.closest[number] = (distance, record["id"])
        return near

    def _tree_hits(self, records: Sequence[Record]) -> list[dict[int, float]]:
        """For each record, the match rate of each problem that it matches at the lowest tau."""
        best: list[dict[int, float]] = [{} for _ in records]
        if not self._nodes:
            return best
        lengths = list(map(len, self._nodes))
        owners: dict[str, list[int]] = {}
        for i, record in enumerate(records):
            request = {
                "text": record["text"],
                "shortest": int(min(lengths) * self._lowest),
                "longest": int(max(lengths) / self._lowest) + 1,
            }
            try:
                strings = self._worker.call(request)
            except WorkerDied as error:
                self.unchecked[i] = str(error)
                strings = None
            self.counts.not_parsed += strings is None
            for string in strings or ():
                owners.setdefault(string, []).append(i)
        if owners:
            self.counts.functions += len(owners)
            self.counts.pairs += len(owners) * len(self._nodes)
            rates = match_rates(list(owners), self._nodes, self._lowest)
            rows, columns = np.nonzero(rates)
            holders = list(owners.values())
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                number, rate = int(self._solved[column]), float(rates[row, column])
                for i in holders[row]:
                    best[i][number] = max(rate, best[i].get(number, 0.0))
        return best

    def note(self) -> dict[str, Json]:
        """The shard's part of the report."""
        return {
            **vars(self.counts),
            "best": [[number, *found] for number, found in sorted(self.best.items())],
            "ngram_documents": sorted(self.ngram_documents.items()),
            "embedding_documents": sorted(self.embedding_documents.items()),
            "closest": [[number, *found] for number, found in sorted(self.closest.items())],
            "ast_documents": [[*key, count] for key, count in sorted(self.ast_documents.items())],
        }


def _rank(hit: dict[str, Json]) -> tuple[int, float]:
    """The order of hits: by method, then the closest first."""
    methods = ("ngram", "embedding", "ast")
    sign = 1 if hit["method"] == "embedding" else -1  # a distance, the others are rates
    return methods.index(hit["method"]), sign * hit["score"]


@functools.lru_cache(maxsize=1)
def _worker_problems(paths: tuple[Path, ...], fields: Fields, sha256: str) -> tuple[Problem, ...]:
    """The problems, once a process.

    Raises:
        ValueError: they are not those that the run began with.
    """
    problems = tuple(load_benchmarks(paths, fields))
    if problems_digest(problems) != sha256:
        raise ValueError(f"{', '.join(map(str, paths))}: changed during the run; run again")
    return problems


@functools.lru_cache(maxsize=1)
def _ngram_table(problems: tuple[Problem, ...], size: int) -> NgramTable:
    return NgramTable(problems, size)


@functools.lru_cache(maxsize=1)
def _embedding_table(problems: tuple[Problem, ...], spec: str) -> EmbeddingTable:
    return EmbeddingTable(problems, json.loads(spec))


def decontaminate_shard(
    shard: ComparedShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: yield each document that holds no problem, reject the others."""
    problems = _worker_problems(shard.against, shard.fields, config["problems"])
    with DisposableWorker("data_pipeline.similarity.ast_match:function_strings") as worker:
        embeddings = _embedding_table(problems, shard.embedding) if shard.embedding else None
        comparison = _Comparison(problems, config, worker, embeddings)
        for batch in _batches(shard.part, tally):
            fit = [record for _, record, broken in batch if broken is None]
            outcomes = zip(comparison.hits(fit), itertools.count(), strict=False)
            for where, record, broken in batch:
                if broken is not None:
                    yield broken
                    continue
                hits, number = next(outcomes)
                outcome = _outcome(where, record, hits, config)
                # What cannot be checked is not kept.
                if number in comparison.unchecked and not isinstance(outcome, Reject):
                    detail = f"the parser did not survive: {comparison.unchecked[number]}"
                    outcome = Reject(record["id"], "unscannable", detail, where)
                yield outcome
        tally.notes.append(comparison.note())


def _batches(part: PartShard, tally: Tally) -> Iterator[list[tuple[str, Record, Reject | None]]]:
    batch: list[tuple[str, Record, Reject | None]] = []
    size = 0
    for where, record in read_shard(part, tally):
        batch.append((where, record, broken_text(where, record)))
        size += len(record["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _outcome(
    where: str, record: Record, hits: list[dict[str, Json]], config: dict[str, Any]
) -> Record | Reject:
    for hit in hits:
        if hit["method"] != "ast" or hit["score"] >= config["drop_at"]:
            what = f"{hit['bench']} {hit['task_id']}"
            if hit["method"] == "ngram":
                detail = f"shares {hit['score']:.0%} of the word runs of {what}"
            elif hit["method"] == "embedding":
                detail = f"its embedding is {hit['score']:.3f} from that of {what}"
            else:
                detail = f"a function matches {what} at {hit['score']:.3f}"
            return Reject(record["id"], str(hit["method"]), detail, where)
    if hits:
        cast(dict[str, Any], record)["decon"] = {"hits": hits[:MAX_HITS]}
    return record
