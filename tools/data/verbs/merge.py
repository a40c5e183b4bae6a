"""`megaphi data merge`: several token files become one."""

import argparse
from pathlib import Path
from typing import Any

from tools.data.options.stage import add_file_verb


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "several token files -> one, in the given order"
    parser = add_file_verb(verbs, "merge", text, run, "PREFIX")
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON result and the line of text."""
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
