"""Join token files, and the provenance and tokenizer alongside them, into one."""

import glob
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.records.jsonl import LineWriter
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import OtherOutput, WorkDirectory
from data_pipeline.tokens.options import MergeRun
from data_pipeline.tokens.tokenize_records import documents_path, tokenizer_path
from megaphi.data.indexed import IndexedDataset, token_file_paths
from megaphi.data.sidecar import TokenFileInfo, merge_token_files, read_info
from megaphi.errors import RunError


def merge_run(run: MergeRun, show: Show) -> Finished:
    """Merge as the user's options say; see `merge_tokens`."""
    out = run.output.out
    info, has_table, reused = merge_tokens(run.prefixes, out, overwrite=run.output.overwrite)
    merged = IndexedDataset(out)
    documents = len(merged.document_index) - 1
    result = {
        "out": str(out),
        "reused": reused,
        "sources": [str(prefix) for prefix in run.prefixes],
        "documents": documents,
        "tokens": merged.num_tokens,
        "tokenizer": None if info is None else info.tokenizer,
        "documents_file": has_table,
    }
    missing = "" if has_table else " | no documents.jsonl: not every source has one"
    line = (
        f"{'reused' if reused else 'merged'} {out}: {documents} documents, "
        f"{merged.num_tokens} tokens from {len(run.prefixes)} token files{missing}"
    )
    return Finished(result, line)


def merge_tokens(
    prefixes: Sequence[Path], out: Path, *, overwrite: bool = False
) -> tuple[TokenFileInfo | None, bool, bool]:
    """Join token files in the given order; documents keep their order and are not shuffled again.

    Args:
        prefixes: token files of one tokenizer.
        out: prefix of the result.
        overwrite: replace a token file of that name.

    Returns:
        The description of the result (None when no source has one), whether there is a provenance
        file, which needs one alongside every source, and whether the finished result of the same
        sources was there already.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: the sources do not fit together, or `out` exists.
        RunError: a source is damaged, or a provenance file has not one line a document.
    """
    work = WorkDirectory(out.with_name(out.name + ".partial"), "merge")
    try:
        # the lock is ours: what is half written here was left by a killed process
        for path in out.parent.glob(f"{glob.escape(out.name)}.*.tmp*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return _merge(prefixes, out, overwrite)
    finally:
        work.discard()


def _merge(
    prefixes: Sequence[Path], out: Path, overwrite: bool
) -> tuple[TokenFileInfo | None, bool, bool]:
    """See `merge_tokens`, which holds the lock."""
    tables = [documents_path(prefix) for prefix in prefixes]
    has_table = all(table.is_file() for table in tables)
    has_tokenizer = bool(prefixes) and tokenizer_path(prefixes[0]).is_dir()
    if not overwrite and any(path.exists() for path in token_file_paths(out)):
        info = _finished(prefixes, out, has_table, has_tokenizer)
        if info is not None:
            return info, has_table, True
        raise OtherOutput(
            f"{out}: there is a token file of this name; "
            "choose another `out`, or set `overwrite` to replace it"
        )
    target = documents_path(out)
    joined = target.with_name(target.name + ".tmp")
    copy = target.with_name(f"{out.name}.tokenizer.tmp")
    try:
        if has_table:
            target.parent.mkdir(parents=True, exist_ok=True)
            _join_tables(prefixes, tables, joined)
        # gone before the new description comes: alongside it they are the new ones
        target.unlink(missing_ok=True)
        shutil.rmtree(tokenizer_path(out), ignore_errors=True)
        info = merge_token_files(prefixes, out)
        if has_table:
            joined.replace(target)
        # merge_token_files has made sure that all sources have the same tokenizer
        if has_tokenizer:
            shutil.copytree(tokenizer_path(prefixes[0]), copy)
            copy.rename(tokenizer_path(out))
    finally:
        joined.unlink(missing_ok=True)
    return info, has_table, False


def _finished(
    prefixes: Sequence[Path], out: Path, has_table: bool, has_tokenizer: bool
) -> TokenFileInfo | None:
    """The description of a finished result of these sources, None where it is another or torn."""
    info, sources = read_info(out), [read_info(prefix) for prefix in prefixes]
    if info is None or "merged" not in info.recipe:
        return None
    same = [entry["bin_sha256"] for entry in info.recipe["merged"]] == [
        None if source is None else source.bin_sha256 for source in sources
    ]
    complete = documents_path(out).is_file() == has_table
    complete &= tokenizer_path(out).is_dir() == has_tokenizer
    if not (same and complete):
        return None
    IndexedDataset(out)  # checks that both files are whole
    return info


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
