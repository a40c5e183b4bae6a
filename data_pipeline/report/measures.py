"""The measures of the corpus report.

Compression, near-duplicate clusters, unique syntax-tree skeletons, 10-grams shared between
documents, coverage of topic by audience by difficulty, and growth: how many new clusters the next
thousand documents bring, which says when more of the same stops paying. Common "diversity" figures
do not see a corpus that was doubled (gzip's window is 32 KiB); every one of these does.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index import Index
from data_pipeline.dedup.stage import find_clusters
from data_pipeline.records.record import Json
from data_pipeline.report.scan import CELL_SEPARATOR, COVERAGE_KEYS, INDEX_NAME
from data_pipeline.runner.record_work import PartShard, read_shard
from data_pipeline.runner.stage import Tally

LEVELS = (0.5, 0.7, 0.85, 0.95)
WINDOW_LOG = 27  # 128 MiB
TOP = 30
QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)
GROWTH_LEVEL = 0.85  # that of `megaphi data dedup`
GROWTH_BLOCK = 1000
_GROWTH_POINTS = 100
_DIGITS = 4

Rows = NDArray[np.int64]


class Scanned:
    """The scanned parts of a corpus as one; row i is document i, parts in order.

    Args:
        directories: of the parts, as `scan_part` left them.
        results: what each part's scan returned.
    """

    def __init__(self, directories: Sequence[Path], results: Sequence[dict[str, Json]]) -> None:
        self._directories = directories
        self.results = results
        self.index = Index([directory / INDEX_NAME for directory in directories])

    def whole(self, name: str) -> NDArray[Any]:
        """An array over all parts, in memory."""
        return np.concatenate(self.parts(name))

    def parts(self, name: str) -> list[NDArray[Any]]:
        """An array of each part."""
        return [np.load(d / f"{name}.npy", allow_pickle=False) for d in self._directories]

    def count(self, name: str) -> Counter[str]:
        """A counter over all parts."""
        total: Counter[str] = Counter()
        for result in self.results:
            total.update(result["counts"][name])
        return total

    def sources(self) -> tuple[list[str], Rows]:
        """The sources, sorted, and [d] the place of each document's source among them."""
        parts = [result["counts"]["sources"] for result in self.results]
        names = sorted({name for part in parts for name in part})
        rows = [
            np.array([names.index(name) for name in part], np.int64)[np.load(d / "sources.npy")]
            for d, part in zip(self._directories, parts, strict=True)
            if part
        ]
        return names, np.concatenate([np.zeros(0, np.int64), *rows])


def corpus_measures(
    shards: Sequence[PartShard], scanned: Scanned, bands: int, sample: int
) -> dict[str, Json]:
    """All measures of one corpus.

    Args:
        shards: its parts.
        scanned: what was learned of them.
        bands: of the signatures.
        sample: one of so many 10-grams was looked at.

    Returns:
        JSON; `examples` with the cluster size and the 10-gram share of each.
    """
    lengths = scanned.whole("lengths")
    levels, roots = _near_duplicates(scanned.index, bands)
    shares, ngrams = _shared_ngrams(scanned, sample)
    sizes = np.bincount(roots, minlength=len(roots))[roots]
    return {
        "documents": len(lengths),
        "bytes": int(lengths.sum()),
        "compression": _compression(shards),
        "near_duplicates": levels,
        "skeletons": _skeletons(scanned),
        "ngrams": ngrams,
        "coverage": _coverage(scanned.count("cells")),
        "names": _frequencies(scanned.count("names")),
        "imports": _frequencies(scanned.count("imports")),
        "growth": _growth(roots),
        "licenses": _frequencies(scanned.count("licenses")),
        "languages": _frequencies(scanned.count("languages")),
        "lengths": _lengths(lengths),
        "examples": _examples(scanned, sizes, shares),
    }


def _compression(shards: Sequence[PartShard]) -> dict[str, Json]:
    """Zstandard over the texts in order; a repeat further back than the window is not seen.

    Raises:
        ValueError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "the report needs zstandard, which is not installed: pip install 'megaphi[data]'"
        ) from None
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=WINDOW_LOG, enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    before = after = 0
    for shard in shards:
        for _, record in read_shard(shard, Tally()):
            text = record["text"].encode("utf-8", "replace") + b"\0"
            before += len(text)
            after += len(compressor.compress(text))
    after += len(compressor.flush())
    return {
        "ratio": round(before / after, _DIGITS),
        "compressed_bytes": after,
        "window_bytes": 2**WINDOW_LOG,
    }


def size_label(size: int) -> str:
    """The class of a cluster size: 1, 2, 3-4, 5-8, 9-16 and so on."""
    if size <= 2:
        return str(size)
    top = 1 << (size - 1).bit_length()
    return f"{top // 2 + 1}-{top}"


def _near_duplicates(index: Index, bands: int) -> tuple[list[dict[str, Json]], Rows]:
    """Clusters by level of similarity, exact copies first; the clusters of the growth curve."""
    found, growth = [], np.zeros(0, np.int64)
    for level in (None, *LEVELS):
        roots, _ = find_clusters(index, level, 0 if level is None else bands)
        if level == GROWTH_LEVEL:
            growth = roots
        sizes = np.bincount(roots, minlength=len(roots))
        sizes = np.sort(sizes[sizes > 0])
        histogram = Counter(map(size_label, sizes.tolist()))  # in the order of size
        found.append(
            {
                "jaccard": level,
                "clusters": len(sizes),
                "redundant_share": round(1 - len(sizes) / max(len(roots), 1), _DIGITS),
                "in_clusters": int(sizes[sizes > 1].sum()),
                "largest": int(sizes.max(initial=0)),
                "cluster_sizes": dict(histogram),
            }
        )
    return found, growth


def _growth(roots: Rows) -> dict[str, Json]:
    """New clusters per 1,000 documents, in the order of the corpus.

    The root of a cluster is its first document, so a document that is its own root is new.
    """
    total = len(roots)
    block = min(GROWTH_BLOCK, max(total // 10, 1))
    block *= max(1, math.ceil(total / (block * _GROWTH_POINTS)))
    is_new = roots == np.arange(total)
    points = [
        {
            "documents": start + len(chunk),
            "new_per_1000": round(1000 * float(chunk.mean()), 1),
        }
        for start in range(0, total, block)
        if len(chunk := is_new[start : start + block])
    ]
    return {"jaccard": GROWTH_LEVEL, "block": block, "points": points}


def _skeletons(scanned: Scanned) -> dict[str, Json]:
    """How many node-type sequences there are for how many documents, and functions."""
    skeletons = scanned.whole("skeletons")
    failed = scanned.count("failed")
    found: dict[str, Json] = {"unparsed": failed["unparsed"], "parser_died": failed["died"]}
    both = {"documents": skeletons[skeletons > 0], "functions": scanned.whole("functions")}
    for name, hashes in both.items():
        _, counts = np.unique(hashes, return_counts=True)
        found[name] = {
            "parsed": len(hashes),
            "distinct": len(counts),
            "unique_share": round(len(counts) / max(len(hashes), 1), _DIGITS),
            "most_repeated": int(counts.max(initial=0)),
        }
    return found


def _shared_ngrams(scanned: Scanned, sample: int) -> tuple[NDArray[np.float64], dict[str, Json]]:
    """[d] share of each document's distinct 10-grams that another has too (NaN without any)."""
    ngrams = scanned.whole("ngrams")
    bounds = scanned.index.bounds
    counts = [len(part) for part in scanned.parts("ngrams")]
    documents = scanned.whole("ngram_documents") + np.repeat(bounds[:-1], counts)
    order = np.argsort(ngrams, kind="stable")
    ranked = ngrams[order]
    same = ranked[1:] == ranked[:-1]
    shared = np.zeros(len(ngrams), np.bool_)
    shared[order[1:]] |= same
    shared[order[:-1]] |= same
    total = np.bincount(documents, minlength=len(scanned.index))
    hits = np.bincount(documents[shared], minlength=len(scanned.index))
    shares = np.where(total > 0, hits / np.maximum(total, 1), np.nan)
    names, rows = scanned.sources()
    by_source = {name: _mean(shares[rows == place]) for place, name in enumerate(names)}
    known = shares[np.isfinite(shares)]
    return shares, {
        "sampled_one_of": sample,
        "documents": len(known),
        "mean_share": _mean(shares),
        "by_source": by_source,
        "histogram": np.histogram(known, bins=10, range=(0, 1))[0].tolist(),
    }


def _mean(shares: NDArray[np.float64]) -> float | None:
    known = shares[np.isfinite(shares)]
    return round(float(known.mean()), _DIGITS) if len(known) else None


def evenness(counts: Sequence[int]) -> dict[str, float]:
    """Entropy in bits, and as a share of what equal counts would have."""
    shares = np.array(counts, np.float64) / max(sum(counts), 1)
    entropy = float(-(shares * np.log2(shares)).sum())
    most = math.log2(len(counts)) if len(counts) > 1 else 0.0
    return {
        "bits": round(abs(entropy), _DIGITS),
        "of_even": round(entropy / most, _DIGITS) if most else 1.0,
    }


def _coverage(cells: Counter[str]) -> dict[str, Json] | None:
    """The table of topic by audience by difficulty; None where no record says what it is about."""
    if not cells:
        return None
    table = {tuple(name.split(CELL_SEPARATOR)): count for name, count in cells.items()}
    axes = [Counter[str]() for _ in COVERAGE_KEYS]
    for cell, count in table.items():
        for axis, value in zip(axes, cell, strict=True):
            axis[value] += count
    values = [sorted(axis) for axis in axes]
    possible = math.prod(map(len, values))
    empty = (cell for cell in itertools.product(*values) if cell not in table)
    ranked = sorted(table.items(), key=lambda item: (-item[1], item[0]))
    return {
        "axes": {
            key: {"counts": dict(_ranked(axis)), "entropy": evenness(list(axis.values()))}
            for key, axis in zip(COVERAGE_KEYS, axes, strict=True)
        },
        "cells": possible,
        "empty_cells": possible - len(table),
        "entropy": evenness(list(table.values())),
        "largest": [{"cell": list(cell), "documents": count} for cell, count in ranked[:TOP]],
        "some_empty": [list(cell) for cell in itertools.islice(empty, TOP)],
    }


def _ranked(counter: Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first, equal ones by name: the same for any order of the parts' results."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def _frequencies(counter: Counter[str]) -> dict[str, Json]:
    """How many values there are, how evenly they are spread, and the most frequent."""
    return {
        "total": sum(counter.values()),
        "distinct": len(counter),
        "once": sum(count == 1 for count in counter.values()),
        "entropy": evenness(list(counter.values())) if counter else None,
        "top": _ranked(counter)[:TOP],
    }


def _lengths(lengths: Rows) -> dict[str, Json]:
    """Quantiles of the lengths in bytes, and a histogram by powers of two."""
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(exponents)
    return {
        "mean": round(float(lengths.mean()), 1),
        "quantiles": {str(q): int(np.percentile(lengths, q, method="nearest")) for q in QUANTILES},
        "histogram": {str(2**place): int(n) for place, n in enumerate(counts) if n},
    }


def _examples(scanned: Scanned, sizes: Rows, shares: NDArray[np.float64]) -> list[dict[str, Json]]:
    """The documents to quote, those with the smallest hashes of all parts."""
    found = []
    for start, result in zip(scanned.index.bounds[:-1], scanned.results, strict=True):
        for example in result["examples"]:
            row = int(start) + example["row"]
            share = round(float(shares[row]), _DIGITS) if np.isfinite(shares[row]) else None
            extra = {"cluster_size": int(sizes[row]), "shared_ngrams": share}
            found.append(example | extra | {"row": row})
    most = max((len(result["examples"]) for result in scanned.results), default=0)
    found.sort(key=lambda example: (example["key"], example["row"]))
    return found[:most]
