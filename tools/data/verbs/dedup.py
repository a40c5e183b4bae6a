"""`megaphi data dedup`: of documents that say the same, keep the best."""

import argparse
import time
from typing import Any

from tools.data.options.stage import add_stage_parser, stage_options, stage_result


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> records without exact and near duplicates, and clusters.jsonl"
    parser = add_stage_parser(subparsers, "dedup", text, run)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--near",
        type=float,
        default=0.85,
        metavar="J",
        help="Jaccard similarity of 5-word shingles from which documents are duplicates",
    )
    choice.add_argument("--exact-only", action="store_true", help="look for equal texts alone")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `dedup`.
    """
    from data_pipeline.dedup.stage import dedup

    started = time.monotonic()
    with stage_options(arguments, "dedup", ("numpy",)) as options:
        manifest, reused = dedup(
            arguments.records,
            arguments.out,
            options,
            near=None if arguments.exact_only else arguments.near,
            compress=arguments.zstd,
        )
    return stage_result(arguments, manifest, reused, started)
