"""A stratified sample of records, the same on every machine: by source and length.

The share of each stratum is its share of the documents, at least one document each; within a
stratum the documents with the smallest hashes of (seed, id) are taken, so that a larger sample
holds every document that a smaller one of the same strata sizes holds.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.records.record import Record, read_part
from data_pipeline.runner.output import check_part, read_manifest
from data_pipeline.runner.record_work import check_identities, identity

LENGTH_BOUNDS = (256, 1024, 4096, 16384)  # bytes


def read_records(directories: Sequence[Path]) -> Iterator[tuple[str, Record]]:
    """Yield (position, record) of records directories, in order.

    Raises:
        FileNotFoundError, RunError: a directory holds no records, or is damaged.
    """
    for directory in directories:
        for part in read_manifest(directory).parts:
            yield from read_part(check_part(directory, part))


def stratum(record: Record) -> str:
    """`SOURCE/LENGTH`: the label of a record's stratum."""
    size = len(record["text"].encode("utf-8"))
    bound = next((f"below {bound}" for bound in LENGTH_BOUNDS if size < bound), "longer")
    return f"{record['source']}/{bound}"


def choose(directories: Sequence[Path], samples: int, seed: int) -> tuple[set[str], dict[str, int]]:
    """Choose documents.

    Args:
        directories: records directories.
        samples: how many; all when there are fewer.
        seed: of the drawing.

    Returns:
        Their ids, and how many are taken of each stratum.

    Raises:
        ValueError: fewer samples than strata are asked for.
        RunError: one id stands for two texts.
    """
    places: list[str] = []
    identities = bytearray()
    heaps: dict[str, list[tuple[int, str]]] = {}
    sizes: Counter[str] = Counter()
    for where, record in read_records(directories):
        places.append(where)
        identities += identity(record)
        label = stratum(record)
        sizes[label] += 1
        heap = heaps.setdefault(label, [])
        key = f"{seed}/{record['id']}".encode()
        rank = -int.from_bytes(hashlib.sha256(key).digest()[:8], "big")  # the smallest stay
        if len(heap) < samples:
            heapq.heappush(heap, (rank, record["id"]))
        else:
            heapq.heappushpop(heap, (rank, record["id"]))
    check_identities(identities, places.__getitem__)
    if samples < len(sizes):
        raise ValueError(
            f"`samples` {samples}: fewer than the {len(sizes)} strata (sources by lengths)"
        )
    quotas = allocate(sizes, samples)
    chosen = {
        name for label, heap in heaps.items() for _, name in heapq.nlargest(quotas[label], heap)
    }
    return chosen, quotas


def allocate(sizes: Counter[str], samples: int) -> dict[str, int]:
    """Share `samples` out in proportion to the sizes, at least 1 each (largest remainders)."""
    total = sum(sizes.values())
    samples = min(samples, total)
    free = samples - len(sizes)
    # One is given to each; the rest in proportion to what each has beyond it.
    exact = {label: free * (size - 1) / max(total - len(sizes), 1) for label, size in sizes.items()}
    quotas = {label: 1 + int(share) for label, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda label: (int(exact[label]) - exact[label], label))
    for label in by_remainder[: samples - sum(quotas.values())]:
        quotas[label] += 1
    return quotas
