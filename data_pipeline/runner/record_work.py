"""Stages from records to records: their shards are the part files of records directories."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.records.record import Json, Record, Reject, read_part
from data_pipeline.runner.output import Manifest, PartFile, check_part, read_manifest
from data_pipeline.runner.stage import IDENTITIES_NAME, Tally, Work
from megaphi.errors import RunError

_IDENTITY = np.dtype([("id", "<u8", 2), ("text", "<u8")])


@dataclass(frozen=True)
class PartShard:
    """One part file of a records directory.

    Attributes:
        directory: the records directory.
        part: the file, as its manifest describes it.
        index: its place among the parts of all directories.
    """

    directory: Path
    part: PartFile
    index: int


def read_manifests(directories: Sequence[Path]) -> list[Manifest]:
    """The manifests of records directories.

    Raises:
        FileNotFoundError: one is not a records directory.
        ValueError: one is given twice: its records would be counted twice.
        RunError: a manifest is damaged or a part file is missing.
    """
    seen: set[Path] = set()
    for directory in directories:
        if directory.resolve() in seen:
            raise ValueError(f"{directory}: given twice; its records would count twice")
        seen.add(directory.resolve())
    return [read_manifest(directory) for directory in directories]


def record_work(
    directories: Sequence[Path],
    finish: Callable[[Path, list[list[Json]]], None] = lambda directory, notes: None,
) -> Work:
    """The work of a stage over records directories: one shard a part file, in the given order.

    The manifests identify the inputs; `read_shard` compares each part with its manifest.

    Args:
        directories: records directories.
        finish: see `Work`.

    Raises:
        FileNotFoundError, ValueError, RunError: see `read_manifests`.
    """

    def describe() -> list[dict[str, Json]]:
        return [
            {
                "path": str(directory),
                "files": len(manifest.parts),
                "bytes": sum(part.bytes for part in manifest.parts),
                "sha256": manifest.records_sha256,
            }
            for directory, manifest in zip(directories, read_manifests(directories), strict=True)
        ]

    manifests = read_manifests(directories)
    parts = [
        (directory, part)
        for directory, manifest in zip(directories, manifests, strict=True)
        for part in manifest.parts
    ]
    return Work(
        shards=[PartShard(directory, part, index) for index, (directory, part) in enumerate(parts)],
        fingerprint=[manifest.records_sha256 for manifest in manifests],
        describe=lambda recorded: describe(),
        identify=describe,
        finish=finish,
        check=lambda shards: _check_shards(parts, shards),
    )


def identity(record: Record) -> bytes:
    """24 bytes by which `check_identities` knows id and text."""
    name, text = (record[key].encode("utf-8", "surrogatepass") for key in ("id", "text"))
    return (
        hashlib.blake2b(name, digest_size=16).digest()
        + hashlib.blake2b(text, digest_size=8).digest()
    )


def check_identities(identities: bytes | bytearray, where: Callable[[int], str]) -> None:
    """Check that no id stands for two texts: labels and decisions would go to the wrong one.

    Args:
        identities: of all records, one after the other.
        where: the position of a record by its number, for the message.

    Raises:
        RunError: one does.
    """
    rows = np.frombuffer(identities, _IDENTITY)
    order = np.lexsort((rows["text"], rows["id"][:, 1], rows["id"][:, 0]))
    rows = rows[order]
    same = (rows["id"][1:] == rows["id"][:-1]).all(axis=1)
    clash = np.flatnonzero(same & (rows["text"][1:] != rows["text"][:-1]))
    if len(clash):
        first, second = sorted((int(order[clash[0]]), int(order[clash[0] + 1])))
        raise RunError(
            f"{where(first)} and {where(second)} are different texts of one id, and "
            f"{len(clash) - 1} more such pairs follow: ids were once made of file names; make "
            "these records again with `megaphi data ingest` or `generate`, or use one directory at "
            "a time"
        )


def _check_shards(parts: Sequence[tuple[Path, PartFile]], shards: Sequence[Path]) -> None:
    """`check_identities` over the files that the shards of a stage left."""
    files = [path / IDENTITIES_NAME for path in shards]
    data = [file.read_bytes() if file.is_file() else b"" for file in files]
    bounds = np.cumsum([0, *(len(each) // _IDENTITY.itemsize for each in data)])

    def where(number: int) -> str:
        shard = int(np.searchsorted(bounds, number, side="right")) - 1
        directory, part = parts[shard]
        return f"{directory / part.name}:{number - int(bounds[shard]) + 1}"

    check_identities(b"".join(data), where)


def read_shard(shard: PartShard, tally: Tally) -> Iterator[tuple[str, Record]]:
    """Yield (position, record) of a shard, counting each in `tally`.

    Raises:
        RunError: the file is not the one in the manifest, or a line of it is not a record.
    """
    path = check_part(shard.directory, shard.part)
    for number, (_, record) in enumerate(read_part(path), start=1):
        tally.records_in += 1
        tally.identities += identity(record)
        yield f"{shard.part.name}:{number}", record


def broken_text(where: str, record: Record) -> Reject | None:
    """The reject of a record whose text holds half a character, which no stage could write."""
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError as error:
        return Reject(record["id"], "surrogate", f"half a character at {error.start}", where)
    return None


def config_of(options: Any) -> dict[str, Json]:
    """The fields of an options dataclass as JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(options).items()
    }
