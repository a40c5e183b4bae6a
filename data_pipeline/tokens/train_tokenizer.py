"""Train a byte-level BPE tokenizer on a records directory, laid out as CodeGen's is.

The vocabulary is 256 bytes and the learned merges, then `<|endoftext|>`, then the 38 runs of white
space. Since those runs are cut out of a text before BPE sees it, they are cut out of the training
text, too: no merge is wasted on indentation. The same records give the same bytes.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from data_pipeline.records.record import Json, digest, read_part
from data_pipeline.runner.finished import Finished, Show, seconds_and_rate
from data_pipeline.runner.output import (
    MANIFEST_NAME,
    Manifest,
    OtherOutput,
    WorkDirectory,
    check_part,
    check_target,
    read_manifest,
    write_json,
)
from data_pipeline.tokens.options import TrainTokenizerRun
from data_pipeline.tokens.tokenizer import (
    END_OF_TEXT,
    SPACE_RUNS,
    TAB_RUNS,
    DocumentTokenizer,
    complete_vocabulary,
)
from megaphi.errors import RunError

VERSION = "1"
NUM_ADDED = 1 + len(SPACE_RUNS) + len(TAB_RUNS)
MIN_VOCAB_SIZE = 256 + NUM_ADDED


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was made: where, its size and identity, and how much text it saw."""

    path: Path
    vocab_size: int
    sha256: str
    num_texts: int
    text_bytes: int
    reused: bool


def train_tokenizer_run(run: TrainTokenizerRun, show: Show) -> Finished:
    """Train as the user's options say, and show the bytes read; see `train_tokenizer`."""
    started, wanted = time.monotonic(), run.vocab_size
    read = 0

    def on_bytes(size: int) -> None:
        nonlocal read
        read += size
        show(read, None)

    made = train_tokenizer(
        run.records,
        run.output.out,
        wanted,
        max_bytes=run.max_bytes,
        overwrite=run.output.overwrite,
        on_bytes=on_bytes,
    )
    result = {
        "out": str(made.path),
        "reused": made.reused,
        "vocab_size": made.vocab_size,
        "tokenizer_sha256": made.sha256,
        "texts": made.num_texts,
        "text_bytes": made.text_bytes,
        "seconds": round(time.monotonic() - started, 3),
    }
    fewer = f" (fewer than {wanted}: the corpus is small)" if made.vocab_size < wanted else ""
    line = (
        f"{'reused' if made.reused else 'trained'} {made.path}: vocabulary {made.vocab_size}"
        f"{fewer} from {made.num_texts} texts | sha256 {made.sha256[:12]} | "
        f"{seconds_and_rate(started, made.text_bytes)}"
    )
    return Finished(result, line)


def train_tokenizer(
    records: Sequence[Path],
    out: Path,
    vocab_size: int,
    *,
    max_bytes: int = TrainTokenizerRun.max_bytes,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> TrainedTokenizer:
    """Train a tokenizer and write it as a directory that `load_tokenizer` and transformers load.

    Args:
        records: records directories.
        out: directory to make.
        vocab_size: ids in all, the 39 added tokens included. A small corpus gives fewer.
        max_bytes: train on a sample of about this much text, chosen by record id; an equal part of
            each directory, so that a small one is not lost next to a large one.
        overwrite: replace a tokenizer that was trained otherwise.
        on_bytes: called with the size of each text as it is read.

    Raises:
        FileNotFoundError: one of `records` is no records directory.
        ValueError: the sizes make no sense, or `out` holds something else.
        RunError: the records are damaged or empty.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"`vocab_size` {vocab_size}: at least {MIN_VOCAB_SIZE} (bytes + added)")
    if max_bytes < 1:
        raise ValueError(f"`max_bytes` {max_bytes}: must be 1 or more")
    check_target(out)
    manifests = [read_manifest(directory) for directory in records]
    hashes = [manifest.records_sha256 for manifest in manifests]
    recipe: dict[str, Json] = {
        "stage": "train-tokenizer",
        "version": VERSION,
        "config": {"vocab_size": vocab_size, "max_bytes": max_bytes},
        "records_sha256": hashes[0] if len(hashes) == 1 else hashes,
    }
    if (out / MANIFEST_NAME).is_file() and not overwrite:
        return _reused(out, recipe)
    work = WorkDirectory(out.with_name(out.name + ".partial"), digest(recipe))
    try:
        sampled = [0, 0]

        def texts() -> Iterator[str]:
            for text in _sample(records, manifests, max_bytes // len(records)):
                size = len(text.encode("utf-8"))
                sampled[0] += 1
                sampled[1] += size
                on_bytes(size)
                yield text

        tokenizer = DocumentTokenizer(_train(texts(), vocab_size), out.name, END_OF_TEXT)
        if not sampled[0]:
            raise RunError(f"{records[0]}: the sample holds no text; raise `max_bytes`")
        tokenizer.save(work.path)
        made: dict[str, Json] = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "texts": sampled[0],
            "text_bytes": sampled[1],
        }
        write_json(work.path / MANIFEST_NAME, recipe | {"result": made})
        work.publish(out)
    finally:
        work.release()
    return _result(out, made, reused=False)


def _reused(out: Path, recipe: dict[str, Json]) -> TrainedTokenizer:
    """Describe a finished tokenizer of the same recipe.

    Raises:
        ValueError: it was made otherwise.
    """
    found = json.loads((out / MANIFEST_NAME).read_bytes())
    made = found.pop("result", None)
    if found != recipe or made is None:
        raise OtherOutput(
            f"{out}: holds the output of other inputs or options; "
            "choose another `out`, or set `overwrite` to replace it"
        )
    return _result(out, made, reused=True)


def _result(out: Path, made: dict[str, Json], reused: bool) -> TrainedTokenizer:
    return TrainedTokenizer(
        path=out,
        vocab_size=made["vocab_size"],
        sha256=made["tokenizer_sha256"],
        num_texts=made["texts"],
        text_bytes=made["text_bytes"],
        reused=reused,
    )


def _sample(
    records: Sequence[Path], manifests: Sequence[Manifest], max_bytes: int
) -> Iterator[str]:
    """The texts of a share of each directory, the same share whatever their order."""
    for directory, manifest in zip(records, manifests, strict=True):
        share = min(1.0, max_bytes / max(manifest.text_bytes, 1))
        for part in manifest.parts:
            for _, record in read_part(check_part(directory, part)):
                # Ids are digits of a hash, so a share of the ids is a share of the records.
                if share == 1.0 or random.Random(record["id"]).random() < share:
                    yield record["text"]


def _train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" {2,}|\t{2,}"), behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return complete_vocabulary(tokenizer)
