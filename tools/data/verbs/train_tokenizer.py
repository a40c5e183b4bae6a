"""`megaphi data train-tokenizer`: a tokenizer for a corpus."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.stage import add_file_verb, progress, seconds_and_rate


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "records -> byte-level BPE tokenizer laid out as CodeGen's"
    parser = add_file_verb(verbs, "train-tokenizer", text, run, "DIR")
    parser.add_argument("records", type=Path, metavar="RECORDS_DIR")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="all ids, 39 added ones included"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=128 * 2**20, metavar="N", help="train on a sample of this"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON result and the line of text."""
    from data_pipeline.tokens.train_tokenizer import train_tokenizer

    started = time.monotonic()
    with progress("read", "B") as show:
        read = 0

        def on_bytes(size: int) -> None:
            nonlocal read
            read += size
            show(read, None)

        made = train_tokenizer(
            arguments.records,
            arguments.out,
            arguments.vocab_size,
            max_bytes=arguments.max_bytes,
            overwrite=arguments.overwrite,
            on_bytes=on_bytes,
        )
    result = {
        "verb": "train-tokenizer",
        "out": str(made.path),
        "reused": made.reused,
        "vocab_size": made.vocab_size,
        "tokenizer_sha256": made.sha256,
        "texts": made.num_texts,
        "text_bytes": made.text_bytes,
        "seconds": round(time.monotonic() - started, 3),
    }
    fewer = f" (fewer than {arguments.vocab_size}: the corpus is small)"
    line = (
        f"{'reused' if made.reused else 'trained'} {made.path}: vocabulary {made.vocab_size}"
        f"{fewer if made.vocab_size < arguments.vocab_size else ''} from {made.num_texts} texts | "
        f"sha256 {made.sha256[:12]} | {seconds_and_rate(started, made.text_bytes)}"
    )
    return result, line
