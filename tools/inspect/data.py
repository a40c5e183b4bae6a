"""What `megaphi inspect` says about token files and the outputs of `megaphi data`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaphi.data.indexed import IndexedDataset, TokenFileError, token_file_paths
from megaphi.data.sidecar import TokenFileInfo, verify_info
from megaphi.errors import RunError

_EOD_SAMPLE = 1000  # documents whose end is looked at without --deep
_HEAD_TOKENS = 256  # tokens shown of each document
READ_TOKENS = 1 << 22


def describe_tokens(prefix: str, *, deep: bool, head: int) -> dict[str, Any]:
    """Describe a token file.

    Without `deep` the index is checked completely, sizes and counts are compared with the
    description, and the ends of at most 1,000 evenly spaced documents are looked at. With it both
    files are hashed and every id is compared with the vocabulary, in bounded memory.

    Args:
        prefix: path without `.bin` or `.idx`.
        deep: read everything.
        head: how many documents to show.

    Raises:
        TokenFileError: a file is damaged or missing.
        ValueError: the tokenizer alongside the file cannot be read.
    """
    indexed = IndexedDataset(prefix)
    info = verify_info(prefix, deep=deep)
    paths = token_file_paths(prefix)
    tokens = np.memmap(paths.bin, indexed.dtype, mode="r")
    borders = np.concatenate([[0], np.cumsum(indexed.lengths, dtype=np.int64)])
    borders = borders[indexed.document_index]
    document_tokens = np.diff(borders)
    report: dict[str, Any] = {
        "dtype": indexed.dtype.name,
        "documents": len(document_tokens),
        "sequences": len(indexed),
        "tokens": indexed.num_tokens,
        "document_tokens": {
            "shortest": int(document_tokens.min()),
            "mean": round(float(document_tokens.mean()), 1),
            "longest": int(document_tokens.max()),
        },
        "bin_bytes": paths.bin.stat().st_size,
        "idx_bytes": paths.idx.stat().st_size,
        **_describe_info(info),
    }
    ends = borders[1:][document_tokens > 0] - 1
    if deep:
        report |= _read_ids(paths.bin, indexed.dtype, ends, None if info is None else info.eod_id)
    elif info is not None:
        if len(ends) > _EOD_SAMPLE:
            ends = ends[np.linspace(0, len(ends) - 1, _EOD_SAMPLE).astype(np.int64)]
        report["documents_checked_for_eod"] = len(ends)
        report["documents_ending_with_eod"] = int((tokens[ends] == info.eod_id).sum())
    report["verified"] = "hashes" if deep and info is not None else "sizes"
    if head:
        report["head"] = _head(prefix, tokens, borders, head)
    return report


def _describe_info(info: TokenFileInfo | None) -> dict[str, Any]:
    """What `<prefix>.json` says; nothing is known of a file that Megatron wrote."""
    if info is None:
        return {"described_by_json": False}
    keys = ("tokenizer", "tokenizer_sha256", "vocab_size", "eod_id", "recipe")
    return {"described_by_json": True} | {key: getattr(info, key) for key in keys}


def _read_ids(
    path: Path, dtype: "np.dtype[Any]", ends: NDArray[np.int64], eod_id: int | None
) -> dict[str, int]:
    """Read all ids block by block: their range, and how many documents end with `eod_id`.

    Args:
        path: the .bin file.
        dtype: of its ids.
        ends: position of the last token of each document that has one, ascending.
        eod_id: None where it is not known.

    Raises:
        TokenFileError: an id is negative.
    """
    smallest, largest, ended, start = np.iinfo(np.int64).max, 0, 0, 0
    with path.open("rb") as file:
        while (block := np.fromfile(file, dtype, READ_TOKENS)).size:
            smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
            first, last = np.searchsorted(ends, [start, start + block.size])
            ended += int((block[ends[first:last] - start] == eod_id).sum())
            start += block.size
    if smallest < 0:
        raise TokenFileError(f"{path}: holds token id {smallest}")
    report = {"smallest_id": smallest, "largest_id": largest}
    if eod_id is not None:
        report["documents_checked_for_eod"] = len(ends)
        report["documents_ending_with_eod"] = ended
    return report


def _head(
    prefix: str, tokens: NDArray[Any], borders: NDArray[np.int64], count: int
) -> list[dict[str, Any]]:
    """The beginnings of the first documents: text where the tokenizer is there, else ids."""
    directory = Path(f"{prefix}.tokenizer")
    tokenizer = None
    if (directory / "tokenizer.json").is_file():
        from data_pipeline.tokens.tokenizer_json import read_tokenizer

        tokenizer = read_tokenizer(directory / "tokenizer.json")
    shown = []
    for number in range(min(count, len(borders) - 1)):
        start, stop = int(borders[number]), int(borders[number + 1])
        ids = tokens[start : min(stop, start + _HEAD_TOKENS)].tolist()
        entry: dict[str, Any] = {"document": number, "tokens": stop - start, "shown": len(ids)}
        if tokenizer is None:
            entry["ids"] = ids
        else:
            entry["text"] = tokenizer.decode(ids, skip_special_tokens=False)
        shown.append(entry)
    return shown


def describe_records(directory: Path, *, deep: bool) -> dict[str, Any]:
    """Describe a records directory; with `deep` every file is hashed.

    Raises:
        RunError: the manifest or a file is damaged or missing.
    """
    from data_pipeline.runner.output import check_part, read_manifest

    manifest = read_manifest(directory)
    if deep:
        for file in (*manifest.parts, *manifest.rejects):
            if not (directory / file.name).is_file():
                raise RunError(f"{directory / file.name}: missing; rebuild the records")
            check_part(directory, file)
    return {
        "stage": manifest.stage,
        "version": manifest.version,
        "config": manifest.config,
        "seed": manifest.seed,
        "inputs": manifest.inputs,
        "records_in": manifest.records_in,
        "records_out": manifest.records_out,
        "rejected": manifest.rejected,
        "text_bytes": manifest.text_bytes,
        "files": len(manifest.parts),
        "bytes": sum(part.bytes for part in manifest.parts),
        "records_sha256": manifest.records_sha256,
        "notes": manifest.notes,
        "run": manifest.run,
        "verified": "hashes" if deep else "sizes",
    }


def describe_tokenizer(directory: Path) -> dict[str, Any]:
    """Describe what `megaphi data train-tokenizer` made.

    Raises:
        RunError: the manifest is not readable.
    """
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        result: dict[str, Any] = manifest["result"]
        return {
            "stage": manifest["stage"],
            "version": manifest["version"],
            "config": manifest["config"],
            "records_sha256": manifest["records_sha256"],
            **result,
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path}: not the manifest of a tokenizer ({error})") from None
