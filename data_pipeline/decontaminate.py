"""The decontaminate stage: documents that hold problems of a benchmark are taken out.

Two tests, as in phi-1's paper (section 5): a run of `ngram` words that a problem has too, in its
statement, solution or tests; and a function whose syntax tree matches a problem's solution at rate
tau (`ast_match.py`), compared with every problem exactly. Statements of fewer words than `ngram`,
but at least `SHORT_STATEMENT`, count where they stand in the document as a whole.

A document is rejected as `ngram` or, at `drop_at`, as `ast`. A kept record with a match at the
lowest tau gets `decon`: `{"hits": [{"bench", "task_id", "method", "score"}]}`, so that it can be
pruned harder later without being compared again. `report.json` and `report.txt`, beside the parts,
say for each tau how many problems have a near twin among all the documents read, and how many do
not: the split of the paper's Table 3.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.ast_match import match_rates, rapidfuzz
from data_pipeline.benchmarks import Fields, Problem, load_benchmarks, problems_digest
from data_pipeline.decontaminate_report import write_reports
from data_pipeline.disposable import DisposableWorker, WorkerDied
from data_pipeline.engine import Stage, Tally, Work
from data_pipeline.record_work import PartShard, broken_text, config_of, read_shard, record_work
from data_pipeline.records import Json, Record, Reject
from data_pipeline.shingles import BATCH_BYTES, U64, Words, hash_shingles, hash_words

VERSION = "1"
TAUS = (0.95, 0.9, 0.85, 0.8)
SHORT_STATEMENT = 8  # words
MAX_HITS = 20  # kept in a record, the closest ones
_FILTER_BITS = 20
_WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")  # as `shingles` divides texts


@dataclass(frozen=True, kw_only=True)
class DecontaminateOptions:
    """What the output depends on, besides the records and the problems.

    Attributes:
        against: benchmark files.
        fields: names of their fields.
        ngram: words of a run that must not occur in both; 0 leaves this test out.
        ast: whether functions are compared with solutions.
        taus: match rates that are reported.
        drop_at: match rate at which a document is rejected.
        min_nodes: solutions of fewer nodes are too common to say anything, and are left out.
    """

    against: tuple[Path, ...]
    fields: Fields = field(default_factory=Fields)
    ngram: int = 13
    ast: bool = True
    taus: tuple[float, ...] = TAUS
    drop_at: float = 0.95
    min_nodes: int = 12

    def __post_init__(self) -> None:
        if not self.against:
            raise ValueError("--against: at least one benchmark file is needed")
        if self.ngram != 0 and not SHORT_STATEMENT <= self.ngram <= 100:
            raise ValueError(f"--ngram {self.ngram}: must be 0 (off) or {SHORT_STATEMENT} to 100")
        if not self.taus or not all(0.5 <= tau <= 1 for tau in self.taus):
            raise ValueError(f"--tau {list(self.taus)}: match rates must be from 0.5 to 1")
        if self.drop_at < min(self.taus):
            raise ValueError(f"--drop-at {self.drop_at:g}: is below the lowest --tau")
        if not self.ngram and not self.ast:
            raise ValueError("--ngram 0 --no-ast: nothing is left to compare")


@dataclass(frozen=True)
class ComparedShard:
    """A part of the records and the problems that it is compared with."""

    part: PartShard
    against: tuple[Path, ...]
    fields: Fields


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
    config = config_of(options)
    del config["against"], config["fields"]
    config["problems"] = problems_digest(problems)
    if options.ast:
        rapidfuzz()
    stage = Stage(
        name="decontaminate", version=VERSION, config=config, function=decontaminate_shard
    )
    work = record_work(
        records, lambda directory, notes: write_reports(directory, notes, problems, config)
    )
    shards = [ComparedShard(part, options.against, options.fields) for part in work.shards]
    return stage, replace(work, shards=shards)


class NgramTable:
    """Runs of words of the problems, by their hashes.

    Args:
        problems: the benchmark.
        size: words of a run.
    """

    def __init__(self, problems: Sequence[Problem], size: int) -> None:
        self._owners: dict[int, dict[int, set[int]]] = {}  # words -> hash -> problems
        self.totals = np.zeros(len(problems), np.int64)  # runs of each problem
        for number, problem in enumerate(problems):
            for text in (*problem.prose, *problem.code):
                words = hash_words([text.encode("utf-8", "replace")], marks=False, lower=True)
                count = len(words.hashes)
                own = size if count >= size else count
                if own == size or (text in problem.prose and count >= SHORT_STATEMENT):
                    owners = self._owners.setdefault(own, {})
                    hashes = hash_shingles(words, own)[0]
                    for value in hashes[_mostly_words(text, own)].tolist():
                        owners.setdefault(value, set()).add(number)
        for owners in self._owners.values():
            for numbers in owners.values():
                for number in numbers:
                    self.totals[number] += 1
        self._sorted = {
            n: np.sort(np.array(list(owners), np.uint64))
            for n, owners in self._owners.items()
            if owners
        }
        # Nearly every run of a document is ruled out by a look at one byte of this filter.
        self._filters = {n: _bit_filter(hashes) for n, hashes in self._sorted.items()}

    def hits(self, texts: Sequence[str]) -> list[Counter[int]]:
        """For each text the number of distinct runs that it shares with each problem."""
        words = hash_words([t.encode("utf-8", "replace") for t in texts], marks=False, lower=True)
        counters: list[Counter[int]] = [Counter() for _ in texts]
        for size, known in self._sorted.items():
            for document, value in self._shared(words, size, known):
                counters[document].update(self._owners[size][value])
        return counters

    def _shared(self, words: Words, size: int, known: U64) -> Iterator[tuple[int, int]]:
        """Distinct (document, hash) of the runs that are in the table."""
        hashes, documents = hash_shingles(words, size)
        maybe = np.flatnonzero(self._filters[size][_low_bits(hashes)])
        hashes, documents = hashes[maybe], documents[maybe]
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        equal = known[places] == hashes
        yield from sorted(set(zip(documents[equal].tolist(), hashes[equal].tolist(), strict=True)))


def _mostly_words(text: str, size: int) -> NDArray[np.bool_]:
    """[s] whether at least half of a run's words have a letter: runs of numbers are no evidence."""
    words = _WORD.findall(text.encode("utf-8", "replace"))
    letters = np.array([not word.isdigit() for word in words], np.int64)
    return np.convolve(letters, np.ones(size, np.int64), "valid") * 2 >= size


def _low_bits(hashes: U64) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)


def _bit_filter(hashes: U64) -> NDArray[np.bool_]:
    table = np.zeros(1 << _FILTER_BITS, np.bool_)
    table[_low_bits(hashes)] = True
    return table


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
    """

    def __init__(
        self, problems: Sequence[Problem], config: dict[str, Any], worker: DisposableWorker
    ) -> None:
        self._problems = problems
        self._config = config
        self._worker = worker
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
        self.best: dict[int, tuple[float, str]] = {}
        self.ngram_documents: Counter[int] = Counter()
        self.ast_documents: Counter[tuple[str, float]] = Counter()

    def hits(self, records: Sequence[Record]) -> list[list[dict[str, Json]]]:
        """The hits of each record, the closest first; n-grams before trees."""
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
            hits.sort(key=lambda hit: (hit["method"] == "ast", -hit["score"]))
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
            except WorkerDied:
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
            "ast_documents": [[*key, count] for key, count in sorted(self.ast_documents.items())],
        }


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


def decontaminate_shard(
    shard: ComparedShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: yield each document that holds no problem, reject the others."""
    problems = _worker_problems(shard.against, shard.fields, config["problems"])
    with DisposableWorker("data_pipeline.ast_match:function_strings") as worker:
        comparison = _Comparison(problems, config, worker)
        for batch in _batches(shard.part, tally):
            fit = [record for _, record, broken in batch if broken is None]
            hits = iter(comparison.hits(fit))
            for where, record, broken in batch:
                yield broken or _outcome(where, record, next(hits), config)
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
        if hit["method"] == "ngram" or hit["score"] >= config["drop_at"]:
            what = f"{hit['bench']} {hit['task_id']}"
            if hit["method"] == "ngram":
                detail = f"shares {hit['score']:.0%} of the word runs of {what}"
            else:
                detail = f"a function matches {what} at {hit['score']:.3f}"
            return Reject(record["id"], str(hit["method"]), detail, where)
    if hits:
        cast(dict[str, Any], record)["decon"] = {"hits": hits[:MAX_HITS]}
    return record
