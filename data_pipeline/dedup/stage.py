"""The dedup stage: of documents that say the same, the best one is kept.

Exact duplicates have equal text but for white space at line ends; near duplicates have an estimated
Jaccard similarity of their 5-word shingles of at least `near` (`minhash.py`). A first pass indexes
the parts (`index.py`); groups are then found band by band with a union-find. Of each group the
document with the highest quality score is kept, then the one with the most stars, the longest, and
the smallest id, and those that are near it are dropped: together they are a cluster. What is near
it only by way of others is a group of its own, from which the best is kept in its turn, so that no
document is dropped for one that it is not near. A second pass writes the records.

The others are rejected as `duplicate` or `near_duplicate`, naming what was kept. A kept record
gets `dup`: `{"cluster": number, "size": documents}`. `clusters.jsonl`, alongside the parts, has one
line a cluster: its number, size, kept id, and for each dropped id the similarity to the kept one.

Memory: about 100 bytes a document (digests or one band's keys, sorted, and the union-find), and the
tables of the documents in clusters. Output does not depend on the number of workers.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index import Index, IndexTask, index_part
from data_pipeline.dedup.options import DedupRun
from data_pipeline.records.jsonl import LineWriter
from data_pipeline.records.record import Record, Reject
from data_pipeline.runner.executors import run_shards
from data_pipeline.runner.finished import Finished, Show, finished_records, run_options
from data_pipeline.runner.first_phase import FirstPhase, run_with_first_phase
from data_pipeline.runner.output import Manifest, WorkDirectory
from data_pipeline.runner.record_work import PartShard, broken_text, read_shard, record_work
from data_pipeline.runner.stage import Options, Stage, Tally
from data_pipeline.similarity.minhash import choose_bands, estimate_jaccard

VERSION = "2"
CLUSTERS_NAME = "clusters.jsonl"
_PAIRS = 2**16  # pairs whose signatures are compared at a time, 64 MiB
_DECISION = [("row", "<i8"), ("cluster", "<i8"), ("size", "<i8"), ("kept", "?"), ("exact", "?")]

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class DedupShard:
    """A part of the records, and the file of what was decided on its documents."""

    part: PartShard
    decisions: Path


def dedup_run(run: DedupRun, show: Show) -> Finished:
    """Deduplicate as the user's options say; see `dedup`."""
    started = time.monotonic()
    manifest, reused = dedup(
        run.records,
        run.output.out,
        run_options(run.output, run.engine, show, ("numpy",)),
        near=None if run.exact_only else run.near,
        compress=run.output.zstd,
    )
    return finished_records(run.output.out, manifest, reused, started)


def dedup(
    records: Sequence[Path],
    out: Path,
    options: Options,
    *,
    near: float | None = DedupRun.near,
    compress: bool = False,
) -> tuple[Manifest, bool]:
    """Deduplicate records directories into one.

    Args:
        records: records directories; the order of the output is theirs.
        out: records directory to make.
        options: see `run_stage`.
        near: smallest similarity of near duplicates; None drops exact duplicates alone.
        compress: write `.jsonl.zst` parts.

    Returns:
        The manifest, and whether a finished output was reused.

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: an option is wrong, or `out` holds something else.
        RunError: the records are damaged, or see `run_stage`.
    """
    bands, rows = (0, 0) if near is None else choose_bands(near)
    config = {"near": near, "bands": bands, "rows": rows}
    stage = Stage(
        name="dedup", version=VERSION, config=config, function=dedup_shard, compress=compress
    )
    place = out.with_name(out.name + ".index.partial")
    work = record_work(records)
    parts: list[PartShard] = list(work.shards)

    def decide(directory: WorkDirectory) -> None:
        _index_parts(parts, directory, bands, rows, options)
        index = Index([directory.shard_directory(i) for i in range(len(parts))])
        _decide(index, place, near, bands)

    first = FirstPhase(directory=place, plan=[VERSION, config, work.fingerprint], run=decide)
    work = replace(
        work,
        shards=[DedupShard(part, place / f"decisions-{part.index:05d}.npy") for part in parts],
        finish=lambda directory, notes: _copy_clusters(place, directory),
    )
    return run_with_first_phase(stage, work, out, options, first)


def _index_parts(
    parts: list[PartShard], work: WorkDirectory, bands: int, rows: int, options: Options
) -> None:
    """Index the parts that are not indexed yet."""
    tasks = [IndexTask(part, work.shard_directory(part.index), bands, rows) for part in parts]
    run_shards(index_part, tasks, work, options.runner, options.on_shard)


class _UnionFind:
    """Disjoint sets of documents; the root of a set is its first document."""

    def __init__(self, size: int) -> None:
        self.roots = np.arange(size, dtype=np.int64)

    def join(self, first: Rows, second: Rows) -> None:
        """Join pairs, and point every document of a set at its root."""
        roots = self.roots
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            while roots[a] != a:
                a = roots[a]
            while roots[b] != b:
                b = roots[b]
            roots[max(a, b)] = min(a, b)
        if len(first):
            while not np.array_equal(flat := roots[roots], roots):
                self.roots = roots = flat


def find_clusters(index: Index, near: float | None, bands: int) -> tuple[Rows, Rows]:
    """Cluster the documents.

    Args:
        index: the index of the corpus.
        near: smallest estimated similarity of a joined pair; None joins exact duplicates alone.
        bands: number of bands.

    Returns:
        [d] first document of each one's cluster, and [d] first document of equal text.
    """
    digests = index.whole("digests")
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    exact: Rows = first[inverse.reshape(-1)].astype(np.int64)
    del digests, first, inverse
    sets = _UnionFind(len(index))
    copies = np.flatnonzero(exact != np.arange(len(index)))
    sets.roots[copies] = exact[copies]
    if near is None:
        return sets.roots, exact
    # One of each set of equal texts stands for all of them.
    eligible = index.whole("worded")
    eligible[copies] = False
    documents: Rows = np.flatnonzero(eligible)
    for band in range(bands):
        for first_k, second_k in _candidates(index.band(band)[documents], documents):
            apart = sets.roots[first_k] != sets.roots[second_k]
            for start in range(0, int(apart.sum()), _PAIRS):
                a = first_k[apart][start : start + _PAIRS]
                b = second_k[apart][start : start + _PAIRS]
                signatures = index.gather("signatures", a), index.gather("signatures", b)
                similar = estimate_jaccard(*signatures) >= near
                sets.join(a[similar], b[similar])
    return sets.roots, exact


def _candidates(keys: NDArray[np.uint64], documents: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Pairs that agree in a band: each document with the bucket's first and with the one before."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    documents = documents[order]
    same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    firsts = starts[np.searchsorted(starts, same, side="right") - 1]
    yield documents[firsts], documents[same]
    yield documents[same - 1], documents[same]


def _split(index: Index, members: Rows, roots: Rows, exact: Rows, near: float) -> Rows:
    """[m] the kept document that each member is near.

    Args:
        index: the index of the corpus.
        members: [m] documents, those of a group together, the best of it first.
        roots: [d] first document of each one's group.
        exact: [d] first document of equal text.
        near: smallest estimated similarity to what is kept.
    """
    kept = np.empty_like(members)
    left = np.arange(len(members))
    while len(left):
        documents = members[left]
        heads = np.concatenate([[True], roots[documents][1:] != roots[documents][:-1]])
        head = documents[np.flatnonzero(heads)[np.cumsum(heads) - 1]]
        is_near = heads | (exact[documents] == exact[head])
        for start in range(0, len(left), _PAIRS):
            some = slice(start, start + _PAIRS)
            is_near[some] |= (
                estimate_jaccard(
                    index.gather("signatures", documents[some]),
                    index.gather("signatures", head[some]),
                )
                >= near
            )
        kept[left[is_near]] = head[is_near]
        left = left[~is_near]
    return kept


def _best_first(index: Index, members: Rows, roots: Rows) -> tuple[Rows, NDArray[Any]]:
    """Members and their ids, by group in the order of their first documents, the best first."""
    ranks, ids = index.gather("ranks", members), index.gather("ids", members)
    order = np.lexsort((ids, -ranks["length"], -ranks["stars"], -ranks["score"], roots[members]))
    return members[order], ids[order]


def _decide(index: Index, place: Path, near: float | None, bands: int) -> None:
    """Cluster, choose what is kept, and write the table of clusters and each part's decisions."""
    roots, exact = find_clusters(index, near, bands)
    sizes = np.bincount(roots, minlength=len(index))
    if near is not None:
        grouped, _ = _best_first(index, np.flatnonzero(sizes[roots] > 1), roots)
        of = _split(index, grouped, roots, exact, near)
        first = np.full(len(index), len(index))
        np.minimum.at(first, of, grouped)
        roots[grouped] = first[of]
        sizes = np.bincount(roots, minlength=len(index))
    members, ids = _best_first(index, np.flatnonzero(sizes[roots] > 1), roots)
    heads = np.concatenate([[True], roots[members][1:] != roots[members][:-1]])[: len(members)]
    numbers = np.cumsum(heads) - 1
    kept = members[np.flatnonzero(heads)[numbers]] if len(members) else members
    decisions = np.zeros(len(members), _DECISION)
    decisions["row"], decisions["cluster"] = members, numbers
    decisions["size"], decisions["kept"] = sizes[roots[members]], heads
    decisions["exact"] = exact[members] == exact[kept]
    similarity = np.ones(len(members), np.float32)
    if near is not None:
        for start in range(0, len(members), _PAIRS):
            some = slice(start, start + _PAIRS)
            similarity[some] = estimate_jaccard(
                index.gather("signatures", members[some]), index.gather("signatures", kept[some])
            )
        similarity[decisions["exact"]] = 1
    kept_ids = ids[np.flatnonzero(heads)[numbers]] if len(members) else ids
    _write_clusters(place / CLUSTERS_NAME, decisions, ids, similarity)
    for part, (start, end) in enumerate(zip(index.bounds[:-1], index.bounds[1:], strict=True)):
        mine = np.flatnonzero((members >= start) & (members < end))
        mine = mine[np.argsort(members[mine])]
        table = np.zeros(len(mine), [*_DECISION, ("of", kept_ids.dtype), ("similarity", "<f4")])
        for name in decisions.dtype.names or ():
            table[name] = decisions[name][mine]
        table["row"] -= start
        table["of"], table["similarity"] = kept_ids[mine], similarity[mine]
        np.save(place / f"decisions-{part:05d}.npy", table, allow_pickle=False)


def _write_clusters(
    path: Path, decisions: NDArray[Any], ids: NDArray[Any], similarity: NDArray[np.float32]
) -> None:
    """One line a cluster; the arrays are sorted by cluster, the kept document first."""
    with LineWriter(path) as table:
        bounds = [*np.flatnonzero(decisions["kept"]).tolist(), len(decisions)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            line = {
                "cluster": number,
                "size": end - start,
                "kept": ids[start].decode(),
                "dropped": [
                    {
                        "id": ids[i].decode(),
                        "exact": bool(decisions["exact"][i]),
                        "jaccard": round(float(similarity[i]), 3),
                    }
                    for i in range(start + 1, end)
                ],
            }
            table.write(json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n")


def _copy_clusters(place: Path, directory: Path) -> None:
    with (
        (place / CLUSTERS_NAME).open("rb") as lines,
        LineWriter(directory / CLUSTERS_NAME) as table,
    ):
        for line in lines:
            table.write(line)


def dedup_shard(
    shard: DedupShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: carry out what was decided on the documents of a part."""
    table = np.load(shard.decisions, allow_pickle=False)
    places = {row: place for place, row in enumerate(table["row"].tolist())}
    for row, (where, record) in enumerate(read_shard(shard.part, tally)):
        broken = broken_text(where, record)
        decision = table[places[row]] if row in places else None
        if broken is not None:
            yield broken
        elif decision is None:
            yield record
        elif decision["kept"]:
            fields = cast(dict[str, Any], record)
            fields["dup"] = {"cluster": int(decision["cluster"]), "size": int(decision["size"])}
            yield record
        else:
            reason = "duplicate" if decision["exact"] else "near_duplicate"
            detail = (
                f"of {decision['of'].decode()}, Jaccard about {decision['similarity']:.2f}, "
                f"cluster {decision['cluster']} of {decision['size']} documents"
            )
            yield Reject(record["id"], reason, detail, where)
