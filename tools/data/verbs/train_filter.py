"""`megaphi data train-filter`: labelled documents -> phi-1's quality filter."""

import argparse
import time
from pathlib import Path
from typing import Any

from tools.data.options.executor import HelpFormatter, add_engine, cores, executor_of
from tools.data.options.stage import progress


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "labels and records -> a quality filter: forest.npz, report.json, report.txt"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train-filter",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "labels", type=Path, metavar="LABELS_DIR", help="records of `megaphi data annotate`"
    )
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="RECORDS_DIR",
        help="the corpus to be filtered: texts are taken from here, by record id",
    )
    parser.add_argument(
        "--features",
        default="hashed",
        metavar="hashed|MODEL",
        help="hashed tokens, or the mean last hidden state of a run, checkpoint or Hugging Face "
        "directory",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="what to make")
    parser.add_argument(
        "--good-from", type=float, default=3.0, metavar="SCORE", help="labels from here are good"
    )
    parser.add_argument(
        "--test-share", type=float, default=0.2, metavar="SHARE", help="documents held out"
    )
    parser.add_argument("--trees", type=int, default=200, metavar="N", help="of the forest")
    parser.add_argument("--min-leaf", type=int, default=3, metavar="N", help="documents in a leaf")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of a document that MODEL reads"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="split and forest")
    parser.add_argument("--overwrite", action="store_true", help="replace another output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `executor_of` and `train_filter`.
    """
    from data_pipeline.quality.train_filter import TrainingOptions, train_filter

    executor = executor_of(arguments)
    started = time.monotonic()
    with progress("train-filter", "part") as show:
        trained = train_filter(
            arguments.labels,
            arguments.records,
            arguments.out,
            TrainingOptions(
                features=arguments.features,
                good_from=arguments.good_from,
                test_share=arguments.test_share,
                trees=arguments.trees,
                min_leaf=arguments.min_leaf,
                seed=arguments.seed,
                max_tokens=arguments.max_tokens,
            ),
            workers=executor.workers if executor.name == "local" else cores(),
            executor=executor,
            overwrite=arguments.overwrite,
            on_part=show,
        )
    report, seconds = trained.report, time.monotonic() - started
    best = report["suggested"]
    result = {
        "verb": "train-filter",
        "out": str(arguments.out),
        "reused": trained.reused,
        **{name: report[name] for name in ("labels", "documents", "roc_auc", "average_precision")},
        "suggested": best,
        "seconds": round(seconds, 3),
    }
    missing = report["labels"]["given"] - report["labels"]["found"]
    line = (
        f"{'reused' if trained.reused else 'trained'} {arguments.out}: "
        f"{report['labels']['found']} labels{f' ({missing} not in the records)' if missing else ''}"
        f" | held-out ROC AUC {report['roc_auc']:.3f} | suggested --threshold "
        f"{best['threshold']:g}: precision {best['precision']:.3f}, recall {best['recall']:.3f}, "
        f"keeps {best['kept']:.1%} | {seconds:.1f} s"
    )
    return result, line
