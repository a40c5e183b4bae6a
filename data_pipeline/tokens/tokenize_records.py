"""Records become a token file: `PREFIX.bin`, `.idx`, `.json`, `.documents.jsonl`, `.tokenizer/`.

Each part of the records is one task: its documents are encoded in batches, an end-of-document id is
put after each, and the ids go to a token file of the part in `PREFIX.partial`. The parts are then
joined and, because Megatron takes its validation split from the end of a token file, the documents
are put in an order drawn from `shuffle_seed`. Memory holds one batch a worker and about 50 bytes a
document; the disk needs room for the tokens three times while this runs. The result does not depend
on the number of workers, and a killed run, started again, keeps the parts that were done.

`PREFIX.documents.jsonl` has one line a document, in order: its index, record id, source, license,
repository, path, revision and address, so that every token can be traced to where it came from
(`megaphi data trace`). `PREFIX.tokenizer/` is a copy of the tokenizer: the trainer hands it on to
the run, its checkpoints and their exports.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.records.jsonl import LineWriter
from data_pipeline.records.record import Json, Record, Reject, digest, read_part
from data_pipeline.runner.executors import Executor, LocalExecutor, executor_of, run_shards
from data_pipeline.runner.finished import Finished, Show, reasons, seconds_and_rate
from data_pipeline.runner.output import (
    LOCK_NAME,
    Manifest,
    OtherOutput,
    PartFile,
    WorkDirectory,
    check_part,
    finish_shard,
    read_manifest,
    start_shard,
)
from data_pipeline.runner.stage import library_versions
from data_pipeline.tokens.options import TokenizeRun
from data_pipeline.tokens.tokenizer import DocumentTokenizer, load_tokenizer
from megaphi.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    optimal_dtype,
    token_file_paths,
)
from megaphi.data.sidecar import TokenFileInfo, read_info, write_info, written_facts
from megaphi.durable import sync
from megaphi.errors import RunError

VERSION = "2"
BATCH_BYTES = 4 * 2**20
BATCH_DOCUMENTS = 1024
PROVENANCE_KEYS = ("id", "source", "license", "repo", "path", "revision", "url")


@dataclass(frozen=True)
class TokenizeResult:
    """What was made.

    Attributes:
        info: the description written to `PREFIX.json`.
        rejected: documents left out, by reason.
        text_bytes: bytes of text that were encoded.
        backend: library that encoded, and why.
        reused: a finished output of the same recipe was there.
    """

    info: TokenFileInfo
    rejected: dict[str, int]
    text_bytes: int
    backend: str
    reused: bool


@dataclass(frozen=True)
class _Task:
    """One part of the records, for a worker."""

    records: Path
    part: PartFile
    tokenizer: str
    tokenizer_sha256: str
    directory: Path


def documents_path(prefix: str | Path) -> Path:
    """The provenance file of a token file."""
    return Path(f"{prefix}.documents.jsonl")


def tokenizer_path(prefix: str | Path) -> Path:
    """The copy of the tokenizer alongside a token file."""
    return Path(f"{prefix}.tokenizer")


def tokenize_run(run: TokenizeRun, show: Show) -> Finished:
    """Tokenize as the user's options say; see `tokenize_records`."""
    started, out = time.monotonic(), run.output.out
    made = tokenize_records(
        run.records,
        run.tokenizer,
        out,
        shuffle_seed=run.shuffle_seed if run.shuffle else None,
        executor=executor_of(run.engine),
        overwrite=run.output.overwrite,
        on_part=show,
    )
    info = made.info
    result = {
        "out": str(out),
        "reused": made.reused,
        "documents": info.num_documents,
        "tokens": info.num_tokens,
        "rejected": made.rejected,
        "vocab_size": info.vocab_size,
        "eod_id": info.eod_id,
        "tokenizer": info.tokenizer,
        "tokenizer_sha256": info.tokenizer_sha256,
        "bin_sha256": info.bin_sha256,
        "idx_sha256": info.idx_sha256,
        "text_bytes": made.text_bytes,
        "backend": made.backend,
        "seconds": round(time.monotonic() - started, 3),
    }
    line = (
        f"{'reused' if made.reused else 'tokenized'} {out}: {info.num_documents} documents, "
        f"{info.num_tokens} tokens ({made.text_bytes / info.num_tokens:.2f} bytes a token) | "
        f"{reasons(made.rejected)} | {made.backend} | {seconds_and_rate(started, made.text_bytes)}"
    )
    return Finished(result, line)


def tokenize_records(
    records: Path,
    tokenizer_name: str,
    prefix: Path,
    *,
    shuffle_seed: int | None = TokenizeRun.shuffle_seed,
    workers: int = 1,
    executor: Executor | None = None,
    overwrite: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> TokenizeResult:
    """Tokenize a records directory.

    Args:
        records: records directory.
        tokenizer_name: see `load_tokenizer`.
        prefix: path of the token file, without suffix.
        shuffle_seed: seed of the documents' order; None keeps the order of the records.
        workers: processes on this machine, where `executor` is not given.
        executor: how parts are encoded; the result does not depend on it.
        overwrite: replace a token file of another recipe.
        on_part: called after each part with (parts done, parts in all).

    Raises:
        FileNotFoundError: no such records directory or tokenizer.
        ValueError: the tokenizer is unfit, or `prefix` holds another token file.
        RunError: the records are damaged, or hold nothing to encode.
        ShardsLeft: the executor leaves parts to others.
    """
    if workers < 1:
        raise ValueError(f"`workers` {workers}: at least 1 is needed")
    if shuffle_seed is not None and not 0 <= shuffle_seed < 2**32:
        raise ValueError(f"`shuffle_seed` {shuffle_seed}: must be from 0 to 4294967295")
    manifest = read_manifest(records)
    tokenizer = load_tokenizer(tokenizer_name)
    backend = f"{tokenizer.backend} ({tokenizer.backend_reason})"
    recipe: dict[str, Json] = {
        "stage": "tokenize",
        "version": VERSION,
        "config": {"shuffle_seed": shuffle_seed, "append_eod": True},
        "records_sha256": manifest.records_sha256,
    }
    partial = prefix.with_name(prefix.name + ".partial")
    found = _reusable(prefix, partial, recipe, tokenizer, overwrite)
    if found is not None:
        return TokenizeResult(found, found.recipe["rejected"], manifest.text_bytes, backend, True)
    executor = executor or LocalExecutor(workers)
    work = WorkDirectory(partial, digest([recipe, tokenizer.sha256]), shared=executor.shared)
    try:
        results = _encode_parts(records, manifest, tokenizer, work, executor, on_part)
        rejected: Counter[str] = Counter()
        for result in results:
            rejected.update(result["reasons"])
        if len(results) == 0 or all(result["documents"] == 0 for result in results):
            raise RunError(f"{records}: holds no document with a token; nothing was written")
        recipe |= {
            "rejected": dict(sorted(rejected.items())),
            "libraries": library_versions((tokenizer.backend,)),
        }
        info = _join(work, len(results), tokenizer, shuffle_seed, recipe)
        expected = manifest.records_out - sum(rejected.values())
        if info.num_documents != expected:
            raise RunError(
                f"{prefix}: {info.num_documents} documents, but {manifest.records_out} records "
                f"less {sum(rejected.values())} rejected are {expected}; nothing was published"
            )
        _publish(work, prefix)
        work.discard()
    finally:
        work.release()
    return TokenizeResult(info, dict(rejected), manifest.text_bytes, backend, False)


def _reusable(
    prefix: Path,
    partial: Path,
    recipe: dict[str, Json],
    tokenizer: DocumentTokenizer,
    overwrite: bool,
) -> TokenFileInfo | None:
    """The description of a finished token file of the same recipe, None to build one.

    Raises:
        ValueError: there is a token file of another recipe.
    """
    if overwrite:
        return None
    info = read_info(prefix)
    if info is None:
        # A run that was killed while it published leaves its work directory alongside its files.
        unfinished = (partial / LOCK_NAME).exists()
        if unfinished or not any(path.exists() for path in token_file_paths(prefix)):
            return None
    else:
        same = all(info.recipe.get(key) == value for key, value in recipe.items())
        if same and info.tokenizer_sha256 == tokenizer.sha256:
            IndexedDataset(prefix)  # checks that both files are whole
            return info
    raise OtherOutput(
        f"{prefix}: there is another token file of this name; "
        "choose another `out`, or set `overwrite` to replace it"
    )


def _encode_parts(
    records: Path,
    manifest: Manifest,
    tokenizer: DocumentTokenizer,
    work: WorkDirectory,
    executor: Executor,
    on_part: Callable[[int, int], None],
) -> list[dict[str, Json]]:
    """Encode the parts that are not done yet; return all results in order."""
    _loaded.clear()
    _loaded[tokenizer.name, tokenizer.sha256] = tokenizer  # for parts that this process encodes
    tasks = [
        _Task(records, part, tokenizer.name, tokenizer.sha256, work.shard_directory(index))
        for index, part in enumerate(manifest.parts)
    ]
    return run_shards(_encode_part, tasks, work, executor, on_part)


_loaded: dict[tuple[str, str], DocumentTokenizer] = {}
"""The tokenizer of this process, by name and identity: loading one takes as long as 10 MB."""


def _worker_tokenizer(name: str, sha256: str) -> DocumentTokenizer:
    """The tokenizer of this process.

    Raises:
        RunError: it is not the one that the run began with.
    """
    if (name, sha256) not in _loaded:
        tokenizer = load_tokenizer(name)
        if tokenizer.sha256 != sha256:
            raise RunError(f"{name}: the tokenizer changed during the run; run again")
        _loaded.clear()
        _loaded[name, sha256] = tokenizer
    return _loaded[name, sha256]


def _encode_part(task: _Task) -> dict[str, Json]:
    """Encode one part: token file, provenance lines and rejects in the task's directory."""
    attempt = start_shard(task.directory)
    tokenizer = _worker_tokenizer(task.tokenizer, task.tokenizer_sha256)
    path = check_part(task.records, task.part)
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        tokens = stack.enter_context(
            IndexedDatasetWriter(attempt / "tokens", optimal_dtype(tokenizer.vocab_size))
        )
        # Provenance lines as "documents" of bytes: the same random access as for the tokens.
        lines = stack.enter_context(IndexedDatasetWriter(attempt / "lines", np.uint8))
        rejects = stack.enter_context(LineWriter(attempt / "rejected.jsonl"))

        def reject(record: Record, where: str, reason: str, detail: str) -> None:
            reasons[reason] += 1
            rejects.write(Reject(record["id"], reason, detail, where).line())

        end = np.asarray([tokenizer.eod_id], tokenizer.dtype)
        for batch in _batches(path, reject):
            encoded = tokenizer.encode_batch([record["text"] for _, record in batch])
            for (where, record), ids in zip(batch, encoded, strict=True):
                if ids.size == 0:
                    reject(record, where, "no_tokens", "the text gives no token")
                    continue
                tokens.add_document(np.concatenate([ids, end]))
                lines.add_document(np.frombuffer(_provenance(record), np.uint8))
        documents = tokens.num_documents
    result: dict[str, Json] = {
        "documents": documents,
        "reasons": dict(reasons),
        "part": [
            {"name": f"{kind}.{end}"} for kind in ("tokens", "lines") for end in ("bin", "idx")
        ],
        "rejected": [{"name": "rejected.jsonl"}],
    }
    return finish_shard(attempt, task.directory, result)


def _batches(
    path: Path, reject: Callable[[Record, str, str, str], None]
) -> Iterator[list[tuple[str, Record]]]:
    """Batches of (position, record) of a part, of bounded size."""
    batch: list[tuple[str, Record]] = []
    size = 0
    for where, record in read_part(path):
        try:
            size += len(record["text"].encode("utf-8"))
        except UnicodeEncodeError as error:
            reject(record, where, "surrogate", f"half a character at {error.start}")
            continue
        batch.append((where, record))
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _provenance(record: Record) -> bytes:
    """A line of the provenance file without its index: `"id":…,"source":…}`."""
    kept = {key: record[key] for key in PROVENANCE_KEYS if key in record}  # type: ignore[literal-required]
    return json.dumps(kept, separators=(",", ":")).encode("ascii")[1:]


def _join(
    work: WorkDirectory,
    num_parts: int,
    tokenizer: DocumentTokenizer,
    shuffle_seed: int | None,
    recipe: dict[str, Json],
) -> TokenFileInfo:
    """Join the parts and put the documents in order, as `final.*` in the work directory."""
    dtype = optimal_dtype(tokenizer.vocab_size)
    for name, kind in (("tokens", dtype), ("lines", np.dtype(np.uint8))):
        with IndexedDatasetWriter(work.path / name, kind) as writer:
            for index in range(num_parts):
                writer.add_index(work.shard_directory(index) / name)
    tokens, lines = IndexedDataset(work.path / "tokens"), IndexedDataset(work.path / "lines")
    final = work.path / "final"
    with IndexedDatasetWriter(final, dtype) as writer, LineWriter(documents_path(final)) as table:
        for position, index in enumerate(_order(len(tokens), shuffle_seed).tolist()):
            writer.add_document(tokens[index])
            table.write(b'{"index":%d,' % position + lines[index].tobytes() + b"\n")
    with LineWriter(Path(f"{final}.rejected.jsonl")) as rejects:
        for index in range(num_parts):
            with (work.shard_directory(index) / "rejected.jsonl").open("rb") as stream:
                for line in stream:
                    rejects.write(line)
    shutil.rmtree(tokenizer_path(final), ignore_errors=True)
    tokenizer.save(tokenizer_path(final))
    info = TokenFileInfo(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        recipe=recipe,
        **written_facts(writer),
    )
    write_info(final, info)
    return info


def _order(count: int, seed: int | None) -> NDArray[np.int64]:
    """The order of the documents; `RandomState`, whose draws no release of numpy changes."""
    if seed is None:
        return np.arange(count, dtype=np.int64)
    return np.random.RandomState(seed).permutation(count).astype(np.int64, copy=False)


def _publish(work: WorkDirectory, prefix: Path) -> None:
    """Rename the finished files; the description goes first and comes last, as it marks them."""
    final = work.path / "final"
    token_file_paths(prefix).info.unlink(missing_ok=True)
    shutil.rmtree(tokenizer_path(prefix), ignore_errors=True)
    tokenizer_path(final).rename(tokenizer_path(prefix))
    for suffix in (".documents.jsonl", ".rejected.jsonl", ".bin", ".idx", ".json"):
        source, target = Path(f"{final}{suffix}"), Path(f"{prefix}{suffix}")
        if suffix == ".rejected.jsonl" and os.path.getsize(source) == 0:
            target.unlink(missing_ok=True)
            continue
        source.replace(target)
    sync(prefix.parent)
