"""`megaphi data report`: how diverse a corpus is, how much of it repeats, what it covers."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.executor import HelpFormatter, add_engine, executor_of
from tools.data.options.stage import progress


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> report.json and report.html: repetition, diversity, coverage"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS_DIR")
    parser.add_argument(
        "--before",
        nargs="+",
        type=Path,
        metavar="RECORDS_DIR",
        help="another corpus to compare with, such as the one before a stage",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="what to make")
    parser.add_argument(
        "--examples", type=int, default=200, metavar="N", help="documents of each corpus to quote"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `build_report`.
    """
    from data_pipeline.report.build import PAGE_NAME, Corpus, build_report

    started = time.monotonic()
    corpora = [Corpus("corpus", arguments.records)]
    if arguments.before is not None:
        corpora = [Corpus("before", arguments.before), Corpus("after", arguments.records)]
    with progress("report", "part") as show:
        report, reused = build_report(
            corpora,
            arguments.out,
            examples=arguments.examples,
            executor=executor_of(arguments),
            overwrite=arguments.overwrite,
            on_part=show,
        )
    seconds = time.monotonic() - started
    summaries = []
    for corpus in report["corpora"]:
        near = next(e for e in corpus["near_duplicates"] if e["jaccard"] == 0.85)
        summaries.append(
            {
                "label": corpus["label"],
                "documents": corpus["documents"],
                "bytes": corpus["bytes"],
                "compression_ratio": corpus["compression"]["ratio"],
                "near_duplicate_share": near["redundant_share"],
                "skeleton_unique_share": corpus["skeletons"]["documents"]["unique_share"],
                "shared_ngrams": corpus["ngrams"]["mean_share"],
            }
        )
    result = {
        "verb": "report",
        "out": str(arguments.out),
        "reused": reused,
        "corpora": summaries,
        "seconds": round(seconds, 3),
    }
    told = "; ".join(
        f"{s['label']}: {s['documents']} documents, {s['bytes'] / 1e6:.1f} MB, compresses "
        f"{s['compression_ratio']:.2f}x, {s['near_duplicate_share']:.1%} near copies"
        for s in summaries
    )
    line = (
        f"{'reused' if reused else 'wrote'} {arguments.out / PAGE_NAME} | {told} | {seconds:.1f} s"
    )
    return result, line
