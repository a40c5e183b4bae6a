"""What the report learns of each part of a corpus: one row a document, and counts.

Parts are scanned by the pool, each into a directory of its own, where a killed run finds those that
were done. The signatures are those of deduplication (`dedup_index.py`).

10-grams are sampled by their hash (every document keeps the same ones), at a rate fixed by the size
of the corpus, so that a document's share is estimated without holding all of a corpus' 10-grams.
"""

import ast
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index import IndexTask, index_part
from data_pipeline.records.record import Json, Record
from data_pipeline.runner.disposable_worker import DisposableWorker, WorkerDied
from data_pipeline.runner.output import finish_shard, start_shard
from data_pipeline.runner.record_work import PartShard, read_shard
from data_pipeline.runner.stage import Tally
from data_pipeline.similarity.ast_match import functions_of, node_string, parse
from data_pipeline.similarity.shingles import U64, hash_shingles, hash_words

NGRAM_WORDS = 10
MAX_NODES = 100_000  # of a skeleton; a longer one is cut
MIN_FUNCTION_NODES = 20  # shorter functions are alike without being copies
EXAMPLE_CHARS = 2000
COVERAGE_KEYS = ("topic", "audience", "difficulty")
CELL_SEPARATOR = "\x1f"
INDEX_NAME = "index"
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class ScanTask:
    """One part to scan.

    Attributes:
        shard: the part.
        directory: where its arrays and its result go.
        bands, rows: of the signatures, see `choose_bands`.
        sample: one of so many 10-grams is looked at.
        examples: documents that are quoted, at most.
    """

    shard: PartShard
    directory: Path
    bands: int
    rows: int
    sample: int
    examples: int


def scan_part(task: ScanTask) -> dict[str, Json]:
    """Scan a part: signatures, 10-grams, skeletons, counts, examples.

    Writes the arrays of `index_part` into a folder `index`, and `lengths` [d] bytes, `sources` [d]
    places in the list of sources, `skeletons` [d] (0 where the text does not parse), `functions`
    [f] hashes of function skeletons, `ngrams` [g] and `ngram_documents` [g]: distinct pairs of
    10-gram and document.
    """
    attempt = start_shard(task.directory)
    index_part(IndexTask(task.shard, attempt / INDEX_NAME, task.bands, task.rows))
    scan = _Scan(task.sample, task.examples)
    batch: list[bytes] = []
    first = 0
    with DisposableWorker("data_pipeline.report.scan:examine") as worker:
        for row, (_, record) in enumerate(read_shard(task.shard, Tally())):
            text = record["text"].encode("utf-8", "replace")
            scan.add(record, text, worker)
            batch.append(text)
            if len(batch) == _BATCH_DOCUMENTS:
                scan.add_ngrams(batch, first)
                batch, first = [], row + 1
    if batch:
        scan.add_ngrams(batch, first)
    arrays = scan.arrays()
    for name, array in arrays.items():
        np.save(attempt / f"{name}.npy", array, allow_pickle=False)
    result: dict[str, Json] = {
        "counts": scan.counts(),
        "examples": scan.examples(),
        "part": [{"name": f"{name}.npy"} for name in arrays],
        "rejected": [],
    }
    return finish_shard(attempt, task.directory, result)


class _Scan:
    """The growing result of a part."""

    def __init__(self, sample: int, examples: int) -> None:
        self._threshold = np.uint64((2**64 - 1) // sample)
        self._num_examples = examples
        self._lengths: list[int] = []
        self._skeletons: list[int] = []
        self._functions: list[int] = []
        self._ngrams: list[U64] = []
        self._ngram_documents: list[NDArray[np.int64]] = []
        self._examples: list[tuple[str, dict[str, Json]]] = []
        self._sources: dict[str, int] = {}
        self._source_rows: list[int] = []
        self._counters: dict[str, Counter[str]] = {
            name: Counter() for name in ("names", "imports", "licenses", "languages", "cells")
        }
        self._failed = Counter[str]()

    def add(self, record: Record, text: bytes, worker: DisposableWorker) -> None:
        """Take in one document, all but its 10-grams."""
        row = len(self._lengths)
        self._lengths.append(len(text))
        self._source_rows.append(self._sources.setdefault(record["source"], len(self._sources)))
        self._counters["licenses"][str(record.get("license") or "")] += 1
        self._counters["languages"][str(record.get("lang") or "")] += 1
        cell = coverage_cell(record)
        if cell is not None:
            self._counters["cells"][CELL_SEPARATOR.join(cell)] += 1
        self._add_example(record, row)
        try:
            found = worker.call(text.decode("utf-8"))
        except WorkerDied:
            found = {"skeleton": 0, "functions": [], "names": [], "imports": [], "died": True}
        self._failed["died" if found.get("died") else "unparsed"] += found["skeleton"] == 0
        self._skeletons.append(found["skeleton"])
        self._functions.extend(found["functions"])
        self._counters["names"].update(found["names"])
        self._counters["imports"].update(found["imports"])

    def _add_example(self, record: Record, row: int) -> None:
        """Keep the documents with the smallest hashes of their ids: a sample without favour."""
        key = hashlib.sha256(record["id"].encode("utf-8", "replace")).hexdigest()
        if len(self._examples) == self._num_examples and key >= self._examples[-1][0]:
            return
        shown = {"row": row, "text": record["text"][:EXAMPLE_CHARS]}
        for name in ("id", "source", "path", "repo", "license"):
            shown[name] = str(record.get(name) or "")
        shown["cell"] = " · ".join(coverage_cell(record) or ())
        self._examples = sorted([*self._examples, (key, shown)], key=lambda pair: pair[0])
        del self._examples[self._num_examples :]

    def add_ngrams(self, texts: list[bytes], first: int) -> None:
        """Take in the sampled 10-grams of consecutive documents, the first of them row `first`."""
        words = hash_words(texts, marks=False, lower=True)
        hashes, documents = hash_shingles(words, NGRAM_WORDS)
        # A document of fewer words has no 10-gram.
        whole = (np.diff(words.bounds) >= NGRAM_WORDS)[documents] & (hashes <= self._threshold)
        pairs = np.stack([documents[whole].astype(np.uint64) + np.uint64(first), hashes[whole]])
        pairs = np.unique(pairs, axis=1)
        self._ngram_documents.append(pairs[0].astype(np.int64))
        self._ngrams.append(pairs[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `scan_part` describes."""
        return {
            "lengths": np.array(self._lengths, np.int64),
            "sources": np.array(self._source_rows, np.int64),
            "skeletons": np.array(self._skeletons, np.uint64),
            "functions": np.array(self._functions, np.uint64),
            "ngrams": np.concatenate([np.zeros(0, np.uint64), *self._ngrams]),
            "ngram_documents": np.concatenate([np.zeros(0, np.int64), *self._ngram_documents]),
        }

    def counts(self) -> dict[str, Json]:
        """Counters by name, the part's sources in order, and the documents without a tree."""
        counts: dict[str, Json] = {k: dict(counter) for k, counter in self._counters.items()}
        return counts | {"sources": list(self._sources), "failed": dict(self._failed)}

    def examples(self) -> list[dict[str, Json]]:
        """The documents to quote, with the hash that orders them."""
        return [shown | {"key": key} for key, shown in self._examples]


def coverage_cell(record: Record) -> tuple[str, ...] | None:
    """(topic, audience, difficulty) of a record, from `gen.plan`, `gen` or `meta`; "" if unknown.

    An exercise is written for a profession, which stands for its audience. None where nothing of
    the three is known.
    """
    fields = cast(dict[str, Any], record)
    gen = fields.get("gen")
    places = [gen.get("plan") if isinstance(gen, dict) else None, gen, fields.get("meta")]

    def value(*names: str) -> str:
        for place in places:
            for name in names:
                if isinstance(place, dict) and isinstance(place.get(name), str):
                    return str(place[name])
        return ""

    cell = (value("topic"), value("audience", "profession"), value("difficulty"))
    return cell if any(cell) else None


def _hash(string: str) -> int:
    """64 bits, never 0, which stands for no tree."""
    digest = hashlib.sha256(string.encode("utf-8")).digest()[:8]
    return int.from_bytes(digest, "big") or 1


def examine(text: str) -> dict[str, Json]:
    """Skeletons, function names and imported packages; runs in a `DisposableWorker`.

    Returns:
        `skeleton` of the whole text (0 where it does not parse), `functions` the skeletons of
        those of some size, `names` of functions, `imports` the distinct top-level packages.
    """
    tree = parse(text)
    if tree is None:
        return {"skeleton": 0, "functions": [], "names": [], "imports": []}
    functions = list(functions_of(tree))
    strings = [node_string(function, MAX_NODES) for function in functions]
    packages: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.split(".")[0])
    return {
        "skeleton": _hash(node_string(tree, MAX_NODES)),
        "functions": [_hash(string) for string in strings if len(string) >= MIN_FUNCTION_NODES],
        "names": [function.name for function in functions],
        "imports": sorted(packages),
    }


def sample_rate(text_bytes: int, most: int) -> int:
    """One of how many 10-grams to look at, so that about `most` remain; a word is 5 bytes."""
    return max(1, math.ceil(text_bytes / 5 / most))
