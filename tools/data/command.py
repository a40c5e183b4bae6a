"""`megaphi data`: build a corpus, stage by stage.

    megaphi data ingest SOURCE... --out DIR
    megaphi data annotate RECORDS_DIR... --model NAME --base-url URL --samples N --out DIR
    megaphi data plan-generation --kind textbooks|exercises --samples N --out PLAN.jsonl
    megaphi data generate PLAN.jsonl --model NAME --base-url URL --out DIR
    megaphi data train-filter LABELS_DIR RECORDS_DIR... --features hashed|MODEL --out DIR
    megaphi data filter RECORDS_DIR... --filter DIR --threshold X --out DIR
    megaphi data report RECORDS_DIR... [--before RECORDS_DIR...] --out DIR
    megaphi data train-tokenizer RECORDS_DIR --vocab-size N --out DIR
    megaphi data tokenize RECORDS_DIR --tokenizer NAME_OR_DIR --out PREFIX
    megaphi data merge PREFIX... --out PREFIX
    megaphi data trace PREFIX|RECORDS_DIR --repo OWNER/NAME
    megaphi data blend PREFIX=EPOCHS... --out FILE.yaml
    megaphi data run RECIPE.yaml [--engine local|ray|slurm]

Progress goes to stderr, one line of result to stdout; `--json` prints one
JSON object instead. A finished output of the same inputs and options is reused.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tools.data.command.verbs import annotate as data_annotate
from tools.data.command.verbs import blend as data_blend
from tools.data.command.verbs import decontaminate as data_decontaminate
from tools.data.command.verbs import dedup as data_dedup
from tools.data.command.verbs import filter as data_filter
from tools.data.command.verbs import generate as data_generate
from tools.data.command.verbs import heuristics as data_heuristics
from tools.data.command.verbs import ingest as data_ingest
from tools.data.command.verbs import report as data_report
from tools.data.command.run import command as data_run
from tools.data.command.verbs import trace as data_trace
from tools.data.command.verbs import train_filter as data_train_filter
from tools.data.options.executor import HelpFormatter, add_engine, executor_of, run_verb
from tools.data.options.stage import progress

EXAMPLES = """examples:
  megaphi data ingest ~/code --out corpus/records
  megaphi data ingest bigcode/the-stack-dedup --source stack --out corpus/stack
  megaphi data tokenize corpus/records --tokenizer codegen --out corpus/train
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the rest of the command are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str]) -> int:
    """Run a sub-verb; returns the exit status.

    Raises:
        ValueError: the call is wrong.
        RunError: the data are broken, or too many documents were refused.
    """
    arguments = make_parser().parse_args(list(argv))
    result, line = run_verb(arguments, argv)
    print(json.dumps(result) if arguments.json else line)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all sub-verbs; `run` of what it parses runs the verb."""
    parser = _Parser(
        prog="megaphi data",
        description="Build a corpus: records, tokenizer, token files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    data_ingest.add_parser(verbs)
    _add_train_tokenizer(verbs)
    _add_tokenize(verbs)
    _add_merge(verbs)
    data_heuristics.add_parser(verbs)
    data_dedup.add_parser(verbs)
    data_decontaminate.add_parser(verbs)
    data_annotate.add_parser(verbs)
    data_generate.add_parser(verbs)
    data_train_filter.add_parser(verbs)
    data_filter.add_parser(verbs)
    data_report.add_parser(verbs)
    data_blend.add_parser(verbs)
    data_run.add_parser(verbs)
    data_trace.add_parser(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], Any], out: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar=out, type=Path, help="what to make")
    parser.add_argument("--overwrite", action="store_true", help="replace another output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _add_train_tokenizer(verbs: Any) -> None:
    text = "records -> byte-level BPE tokenizer laid out as CodeGen's"
    parser = _add_verb(verbs, "train-tokenizer", text, _train_tokenizer, "DIR")
    parser.add_argument("records", type=Path, metavar="RECORDS_DIR")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="all ids, 39 added ones included"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=128 * 2**20, metavar="N", help="train on a sample of this"
    )


def _add_tokenize(verbs: Any) -> None:
    text = "records -> token file PREFIX.bin, .idx, .json, .documents.jsonl, .tokenizer/"
    parser = _add_verb(verbs, "tokenize", text, _tokenize, "PREFIX")
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


def _add_merge(verbs: Any) -> None:
    text = "several token files -> one, in the given order"
    parser = _add_verb(verbs, "merge", text, _merge, "PREFIX")
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX")


def _seconds(started: float, size: int) -> str:
    """`1.2 s, 25.3 MB/s` since `started` for `size` bytes."""
    seconds = max(time.monotonic() - started, 1e-9)
    return f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"


def _reasons(rejected: dict[str, int]) -> str:
    """`12 rejected (empty 10, utf8 2)`."""
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} rejected" + (f" ({counts})" if counts else "")


def _train_tokenizer(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
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
        f"sha256 {made.sha256[:12]} | {_seconds(started, made.text_bytes)}"
    )
    return result, line


def _tokenize(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
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
        f"token) | {_reasons(made.rejected)} | {made.backend} | "
        f"{_seconds(started, made.text_bytes)}"
    )
    return result, line


def _merge(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from data_pipeline.tokens.merge_tokens import merge_tokens
    from megaphi.data.indexed import IndexedDataset

    info, has_table, reused = merge_tokens(
        arguments.prefixes, arguments.out, overwrite=arguments.overwrite
    )
    merged = IndexedDataset(arguments.out)
    documents = len(merged.document_index) - 1
    result = {
        "verb": "merge",
        "out": str(arguments.out),
        "reused": reused,
        "sources": [str(prefix) for prefix in arguments.prefixes],
        "documents": documents,
        "tokens": merged.num_tokens,
        "tokenizer": None if info is None else info.tokenizer,
        "documents_file": has_table,
    }
    missing = "" if has_table else " | no documents.jsonl: not every source has one"
    line = (
        f"{'reused' if reused else 'merged'} {arguments.out}: {documents} documents, "
        f"{merged.num_tokens} tokens from {len(arguments.prefixes)} token files{missing}"
    )
    return result, line
