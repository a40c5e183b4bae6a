"""`megaphi data filter`: keep the documents that the quality filter finds educational."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.stage import add_stage_parser, stage_options, stage_result


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> the educational ones, each with its score, and drift.json"
    parser = add_stage_parser(subparsers, "filter", text, run)
    parser.add_argument(
        "--filter", required=True, type=Path, metavar="DIR", help="of `megaphi data train-filter`"
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--threshold", type=float, metavar="X", help="lowest score that is kept")
    choice.add_argument(
        "--keep-tokens", type=int, metavar="N", help="keep the best documents up to N tokens"
    )
    choice.add_argument(
        "--precision", type=float, metavar="P", help="the lowest threshold of this held-out share"
    )
    parser.add_argument(
        "--bytes-per-token",
        type=float,
        default=3.6,
        metavar="B",
        help="by which --keep-tokens counts; `megaphi data tokenize` prints yours",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="where the filter's embedding model lies now"
    )
    parser.add_argument(
        "--max-drift",
        type=float,
        metavar="PSI",
        help="population stability index above chance from which nothing is written",
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `load_filter` and `filter_records`.
    """
    from data_pipeline.quality.filter import Selection, filter_records, load_filter

    started = time.monotonic()
    selection = Selection(
        threshold=arguments.threshold,
        keep_tokens=arguments.keep_tokens,
        precision=arguments.precision,
        bytes_per_token=arguments.bytes_per_token,
        max_drift=arguments.max_drift,
    )
    quality_filter = load_filter(arguments.filter, arguments.model)
    with stage_options(arguments, "filter", ("numpy", "scikit-learn")) as options:
        manifest, reused, drift = filter_records(
            arguments.records,
            quality_filter,
            arguments.out,
            selection,
            options,
            compress=arguments.zstd,
        )
    result, line = stage_result(arguments, manifest, reused, started)
    result["drift"] = drift
    line += (
        f" | threshold {drift['threshold']:g}, about {drift['kept_tokens']} of {drift['tokens']} "
        f"tokens | scores {drift['verdict']} (PSI {drift['psi']:.3f})"
    )
    if drift["verdict"] == "drift":
        line += ": unlike the training sample, label some of these records and train again"
    if arguments.keep_tokens is not None and drift["tokens"] < arguments.keep_tokens:
        line += f" | fewer than --keep-tokens {arguments.keep_tokens}: all are kept"
    return result, line
