"""`<prefix>.json` alongside a token file: what tokenizer and recipe made it, and its hashes.

Megatron ignores the file, and token files without it are legal; with it, training can refuse a
tokenizer that does not fit, and a copy that went wrong can be told from the original. Merging and
splitting token files live here because they carry the description along.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphi.data.indexed import (
    IndexedDatasetWriter,
    TokenFileError,
    read_index,
    token_file_paths,
)
from megaphi.durable import NewFile, file_sha256, sync

_READ_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TokenFileInfo:
    """What is known about a token file; the keys of `<prefix>.json`."""

    tokenizer: str
    """Name of the tokenizer."""
    tokenizer_sha256: str
    """Hash that identifies it, whatever its name."""
    vocab_size: int
    """Ids lie in [0, vocab_size)."""
    eod_id: int
    """Id that ends each document."""
    num_documents: int
    """Documents, empty ones included."""
    num_sequences: int
    """Sequences; usually one a document."""
    num_tokens: int
    """Tokens, EOD included."""
    bin_sha256: str
    """SHA-256 of `<prefix>.bin`, hex."""
    idx_sha256: str
    """SHA-256 of `<prefix>.idx`, hex."""
    bin_bytes: int
    """Size of `<prefix>.bin`."""
    idx_bytes: int
    """Size of `<prefix>.idx`."""
    recipe: dict[str, Any]
    """How the file was made: free JSON."""


def written_facts(writer: IndexedDatasetWriter) -> dict[str, Any]:
    """Counts, sizes and digests of a finished token file, as fields of a `TokenFileInfo`."""
    paths = token_file_paths(writer.prefix)
    return {
        "num_documents": writer.num_documents,
        "num_sequences": writer.num_sequences,
        "num_tokens": writer.num_tokens,
        "bin_sha256": writer.bin_sha256,
        "idx_sha256": writer.idx_sha256,
        "bin_bytes": paths.bin.stat().st_size,
        "idx_bytes": paths.idx.stat().st_size,
    }


def write_info(prefix: str | Path, info: TokenFileInfo) -> None:
    """Write `<prefix>.json`, complete or not at all, replacing an older one.

    Raises:
        TokenFileError: the disk refuses.
        TypeError: the recipe is not JSON.
    """
    path = token_file_paths(prefix).info
    text = json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False) + "\n"
    file = NewFile(path, TokenFileError)
    try:
        file.write(text.encode("utf-8"))
        file.close()
        file.publish()
    finally:
        file.discard()
    sync(path.parent)


def read_info(prefix: str | Path) -> TokenFileInfo | None:
    """Read `<prefix>.json`; None when there is none.

    Raises:
        TokenFileError: it is not JSON, or a key is missing, unknown or of the wrong type.
    """
    path = token_file_paths(prefix).info
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenFileError(f"{path}: not JSON: {error}") from error
    types = {field.name: field.type for field in dataclasses.fields(TokenFileInfo)}
    if not isinstance(values, dict) or values.keys() != types.keys():
        keys = values.keys() if isinstance(values, dict) else set()
        raise TokenFileError(
            f"{path}: not the description of a token file; "
            f"missing keys {sorted(types.keys() - keys)}, unknown {sorted(keys - types.keys())}"
        )
    for key, value in values.items():
        kind = {str: str, int: int}.get(types[key], dict)  # type: ignore[arg-type]
        if type(value) is not kind:
            raise TokenFileError(f"{path}: {key} must be {kind.__name__}, not {value!r:.60}")
    return TokenFileInfo(**values)


def verify_info(prefix: str | Path, *, deep: bool = True) -> TokenFileInfo | None:
    """Compare a token file with its description; None when it has none.

    Args:
        prefix: the token file.
        deep: re-hash both files and check every id against the vocabulary (reads the whole file);
            otherwise only sizes and counts.

    Raises:
        TokenFileError: something differs, or the token file itself is broken; names the file.
    """
    info = read_info(prefix)
    if info is None:
        return None
    index = read_index(prefix)
    paths = token_file_paths(prefix)
    for path, recorded in ((paths.bin, info.bin_bytes), (paths.idx, info.idx_bytes)):
        if path.stat().st_size != recorded:
            raise TokenFileError(
                f"{path}: {path.stat().st_size} bytes, but {paths.info.name} records {recorded}"
            )
    found = (len(index.document_index) - 1, len(index.lengths), index.num_tokens)
    described = (info.num_documents, info.num_sequences, info.num_tokens)
    if found != described:
        raise TokenFileError(
            f"{paths.info}: records {described} documents, sequences and tokens, "
            f"but the index holds {found}"
        )
    if deep:
        for path, digest in ((paths.bin, info.bin_sha256), (paths.idx, info.idx_sha256)):
            if file_sha256(path) != digest:
                raise TokenFileError(
                    f"{path}: SHA-256 differs from {paths.info.name}: the file was changed or "
                    "damaged; copy or build it again"
                )
        _check_vocabulary(paths.bin, index.dtype, info.vocab_size)
    return info


def _check_vocabulary(path: Path, dtype: "np.dtype[Any]", vocab_size: int) -> None:
    """Read the whole .bin and refuse ids outside of [0, vocab_size)."""
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            ids = np.frombuffer(block, dtype)
            for extreme in (int(ids.min()), int(ids.max())):
                if not 0 <= extreme < vocab_size:
                    raise TokenFileError(
                        f"{path}: holds token id {extreme}, outside of the vocabulary of "
                        f"{vocab_size}"
                    )


def merge_token_files(
    prefixes: Sequence[str | Path], out_prefix: str | Path
) -> TokenFileInfo | None:
    """Join token files into one, in the given order; they must share dtype and tokenizer.

    The token bytes of each source are compared with its recorded hash on the way.

    Args:
        prefixes: one or more token files.
        out_prefix: the token file to make; not one of the sources.

    Returns:
        The description written for the result, its recipe listing the sources; None (and no
        description) when no source has one.

    Raises:
        ValueError: nothing to merge, a source is also the output, or they do not fit together.
        TokenFileError: a source is broken.
    """
    if not prefixes:
        raise ValueError(f"{out_prefix}: no token files to merge")
    if Path(out_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise ValueError(f"{out_prefix}: is both source and output")
    infos = [read_info(prefix) for prefix in prefixes]
    first = infos[0]
    for prefix, info in zip(prefixes, infos, strict=True):
        if _tokenizer(info) != _tokenizer(first):
            raise ValueError(
                f"{prefix} was made with {_describe(info)}, but {prefixes[0]} with "
                f"{_describe(first)}: they cannot be merged"
            )
    with IndexedDatasetWriter(out_prefix, read_index(prefixes[0]).dtype) as writer:
        for prefix, info in zip(prefixes, infos, strict=True):
            copied = writer.add_index(prefix)
            if info is not None and copied != info.bin_sha256:
                raise TokenFileError(
                    f"{token_file_paths(prefix).bin}: SHA-256 differs from the recorded one: the "
                    "file was changed or damaged; copy or build it again"
                )
    if first is None:
        return None
    sources = [_source(p, info) for p, info in zip(prefixes, infos, strict=True) if info]
    merged = dataclasses.replace(first, **written_facts(writer), recipe={"merged": sources})
    write_info(out_prefix, merged)
    return merged


def _tokenizer(info: TokenFileInfo | None) -> tuple[str, int, int] | None:
    """What must agree for two token files to hold the same language."""
    return None if info is None else (info.tokenizer_sha256, info.vocab_size, info.eod_id)


def _describe(info: TokenFileInfo | None) -> str:
    if info is None:
        return "an unknown tokenizer (no .json alongside it)"
    return (
        f"tokenizer {info.tokenizer} {info.tokenizer_sha256[:12]} "
        f"({info.vocab_size} ids, EOD {info.eod_id})"
    )


def _source(prefix: str | Path, info: TokenFileInfo) -> dict[str, Any]:
    """A source in the recipe of what was made from it; no folders, so that builds compare equal."""
    return {
        "name": Path(prefix).name,
        "bin_sha256": info.bin_sha256,
        "num_documents": info.num_documents,
        "num_tokens": info.num_tokens,
        "recipe": info.recipe,
    }
