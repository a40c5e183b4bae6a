"""`megaphi data tokenize`: records become a token file."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.executor import add_engine, executor_of
from tools.data.options.stage import add_file_verb, progress, reasons, seconds_and_rate


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "records -> token file PREFIX.bin, .idx, .json, .documents.jsonl, .tokenizer/"
    parser = add_file_verb(verbs, "tokenize", text, run, "PREFIX")
    parser.add_argument("records", type=Path, metavar="RECORDS_DIR")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME_OR_DIR",
        help="codegen (phi-1's), a tokenizer directory, or OWNER/NAME on the Hugging Face hub",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--shuffle-seed",
        type=int,
        default=1234,
        metavar="S",
        help="order of the documents; shuffled because validation data are taken by position",
    )
    order.add_argument("--no-shuffle", action="store_true", help="keep the order of the records")
    add_engine(parser)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON result and the line of text."""
    from data_pipeline.tokens.tokenize_records import tokenize_records

    started = time.monotonic()
    with progress("tokenize", "part") as show:
        made = tokenize_records(
            arguments.records,
            arguments.tokenizer,
            arguments.out,
            shuffle_seed=None if arguments.no_shuffle else arguments.shuffle_seed,
            executor=executor_of(arguments),
            overwrite=arguments.overwrite,
            on_part=show,
        )
    info = made.info
    result = {
        "verb": "tokenize",
        "out": str(arguments.out),
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
        f"{'reused' if made.reused else 'tokenized'} {arguments.out}: {info.num_documents} "
        f"documents, {info.num_tokens} tokens ({made.text_bytes / info.num_tokens:.2f} bytes a "
        f"token) | {reasons(made.rejected)} | {made.backend} | "
        f"{seconds_and_rate(started, made.text_bytes)}"
    )
    return result, line
