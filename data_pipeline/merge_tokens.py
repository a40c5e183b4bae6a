"""Join token files, and the provenance and tokenizer beside them, into one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.jsonl import LineWriter
from data_pipeline.tokenize_records import documents_path, tokenizer_path
from megaphi.data.indexed import IndexedDataset, token_file_paths
from megaphi.data.sidecar import TokenFileInfo, merge_token_files
from megaphi.errors import RunError


def merge_tokens(
    prefixes: Sequence[Path], out: Path, *, overwrite: bool = False
) -> tuple[TokenFileInfo | None, bool]:
    """Join token files in the given order; documents keep their order and are not shuffled again.

    Args:
        prefixes: token files of one tokenizer.
        out: prefix of the result.
        overwrite: replace a token file of that name.

    Returns:
        The description of the result (None when no source has one), and whether a provenance file
        was written, which needs one beside every source.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: the sources do not fit together, or `out` exists.
        RunError: a source is damaged, or a provenance file has not one line a document.
    """
    if not overwrite and any(path.exists() for path in token_file_paths(out)):
        raise ValueError(
            f"{out}: there is a token file of this name; "
            "choose another --out, or pass --overwrite to replace it"
        )
    tables = [documents_path(prefix) for prefix in prefixes]
    has_table = all(table.is_file() for table in tables)
    target = documents_path(out)
    joined = target.with_name(target.name + ".tmp")
    try:
        if has_table:
            target.parent.mkdir(parents=True, exist_ok=True)
            _join_tables(prefixes, tables, joined)
        info = merge_token_files(prefixes, out)
        if has_table:
            joined.replace(target)
        else:
            target.unlink(missing_ok=True)
        # merge_token_files has made sure that all sources have the same tokenizer
        shutil.rmtree(tokenizer_path(out), ignore_errors=True)
        if info is not None and tokenizer_path(prefixes[0]).is_dir():
            shutil.copytree(tokenizer_path(prefixes[0]), tokenizer_path(out))
    finally:
        joined.unlink(missing_ok=True)
    return info, has_table


def _join_tables(prefixes: Sequence[Path], tables: Sequence[Path], out: Path) -> None:
    """Concatenate provenance files, counting the documents on."""
    with LineWriter(out) as writer:
        for prefix, table in zip(prefixes, tables, strict=True):
            before = writer.lines
            with table.open("rb") as stream:
                for number, line in enumerate(stream):
                    try:
                        entry = json.loads(line)
                        in_order = entry["index"] == number
                    except (ValueError, TypeError, KeyError):
                        in_order = False
                    if not in_order:
                        raise RunError(f"{table}:{number + 1}: not the line of document {number}")
                    entry["index"] += before
                    writer.write(json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n")
            documents = len(IndexedDataset(prefix).document_index) - 1
            if writer.lines - before != documents:
                raise RunError(
                    f"{table}: {writer.lines - before} lines, but {prefix} has {documents} "
                    "documents; tokenize it again"
                )
