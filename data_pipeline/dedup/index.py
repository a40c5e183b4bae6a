"""The index of deduplication: one row a document, in files of numpy arrays alongside the output.

Built part by part by the pool into `OUT.index.partial`, where a killed run finds the parts that
were done. On the disk it has 512 bytes of signature, 8 bytes a band and about 80 other bytes a
document; the clustering maps these files and holds one band at a time in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.records.record import Json, Record
from data_pipeline.runner.output import finish_shard, start_shard
from data_pipeline.runner.record_work import PartShard, read_shard
from data_pipeline.runner.stage import Tally
from data_pipeline.similarity.digest import text_digest
from data_pipeline.similarity.minhash import BINS, U32, band_keys, signatures
from data_pipeline.similarity.shingles import BATCH_BYTES, U64

_RANKS = np.dtype([("score", "<f8"), ("stars", "<f8"), ("length", "<i8")])


@dataclass(frozen=True)
class IndexTask:
    """One part to index; `bands` is 0 where only exact duplicates are looked for."""

    shard: PartShard
    directory: Path
    bands: int
    rows: int


def rank_of(record: Record, length: int) -> tuple[float, float, int]:
    """What decides which of several copies is kept: quality score, stars, length."""
    fields: dict[str, Any] = dict(record)
    quality, meta = fields.get("quality"), fields.get("meta")
    score = quality.get("score") if isinstance(quality, dict) else None
    stars = None
    if isinstance(meta, dict):
        stars = next(
            (
                meta[k]
                for k in ("max_stars_count", "star_events_count", "stars", "score")
                if meta.get(k) is not None
            ),
            None,
        )
    return _number(score), _number(stars), length


def _number(value: Json) -> float:
    """A finite number, or minus infinity where there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return max(min(float(value), 1e300), -1e300) if value == value else -np.inf
    return -np.inf


def index_part(task: IndexTask) -> dict[str, Json]:
    """Index one part: `digests`, `ranks`, `ids` and, for near duplicates, signatures and bands."""
    attempt = start_shard(task.directory)
    digests: list[bytes] = []
    ranks: list[tuple[float, float, int]] = []
    ids: list[bytes] = []
    slots: list[U32] = [np.zeros((0, BINS), np.uint32)]
    worded: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    for batch in _text_batches(task.shard):
        texts = []
        for record in batch:
            # A half character cannot be written; the second pass rejects its record.
            text = record["text"].encode("utf-8", "replace")
            texts.append(text)
            digests.append(text_digest(text))
            ranks.append(rank_of(record, len(text)))
            ids.append(record["id"].encode("utf-8", "replace"))
        if task.bands:
            batch_slots, batch_worded = signatures(texts)
            slots.append(batch_slots)
            worded.append(batch_worded)
    arrays: dict[str, NDArray[Any]] = {
        "digests": np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2),
        "ranks": np.array(ranks, _RANKS),
        "ids": np.array(ids, f"S{max(map(len, ids), default=1)}"),
    }
    if task.bands:
        arrays["signatures"] = np.concatenate(slots)
        arrays["bands"] = band_keys(arrays["signatures"], task.bands, task.rows)
        arrays["worded"] = np.concatenate(worded)
    for name, array in arrays.items():
        np.save(attempt / f"{name}.npy", array, allow_pickle=False)
    result: dict[str, Json] = {
        "documents": len(ids),
        "part": [{"name": f"{name}.npy"} for name in arrays],
        "rejected": [],
    }
    return finish_shard(attempt, task.directory, result)


def _text_batches(shard: PartShard) -> Iterator[list[Record]]:
    """Records of a part in batches of about `BATCH_BYTES` characters."""
    batch: list[Record] = []
    size = 0
    for _, record in read_shard(shard, Tally()):
        batch.append(record)
        size += len(record["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Index:
    """The indices of all parts as one: row i is document i of the corpus, parts in order.

    Args:
        directories: of the parts, as `index_part` left them.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        counts = [len(self._part(i, "digests")) for i in range(len(directories))]
        self.bounds = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _part(self, index: int, name: str) -> NDArray[Any]:
        path = self._directories[index] / f"{name}.npy"
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError:  # an array without elements cannot be mapped
            return np.asarray(np.load(path, allow_pickle=False))

    def whole(self, name: str) -> NDArray[Any]:
        """An array over all documents, in memory."""
        return np.concatenate([self._part(i, name) for i in range(len(self._directories))])

    def band(self, band: int) -> U64:
        """[d] keys of one band, in memory."""
        parts = [self._part(i, "bands")[band] for i in range(len(self._directories))]
        return np.concatenate(parts)

    def gather(self, name: str, documents: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of the given documents, read from the parts where they lie."""
        parts = np.searchsorted(self.bounds, documents, side="right") - 1
        first = self._part(0, name)
        kind = first.dtype
        if kind.kind == "S":
            sizes = [self._part(int(i), name).dtype.itemsize for i in np.unique(parts)]
            kind = np.dtype(f"S{max(sizes, default=1)}")
        rows = np.zeros((len(documents), *first.shape[1:]), kind)
        for part in np.unique(parts).tolist():
            mine = np.flatnonzero(parts == part)
            rows[mine] = self._part(part, name)[documents[mine] - self.bounds[part]]
        return rows
