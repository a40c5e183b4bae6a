"""`megaphi data heuristics`: signals, secrets and thresholds over records."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.data.options.stage import add_stage_parser, stage_options, stage_result

TREATMENTS = ("redact", "reject", "keep")


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> records with signals, without secrets, within thresholds"
    parser = add_stage_parser(subparsers, "heuristics", text, run)
    parser.add_argument(
        "--thresholds",
        type=Path,
        metavar="FILE",
        help="YAML rules instead of ours; records that carry signals are not parsed again",
    )
    parser.add_argument("--signals-only", action="store_true", help="apply no rule")
    parser.add_argument(
        "--secrets", choices=TREATMENTS, default="redact", help="keys, tokens, passwords"
    )
    parser.add_argument(
        "--pii", choices=TREATMENTS, default="redact", help="e-mail and public IP addresses"
    )
    parser.add_argument(
        "--no-detect-secrets", action="store_true", help="find secrets by our own rules alone"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_heuristics` and `run_stage`.
    """
    from data_pipeline.heuristics.stage import HeuristicsOptions, plan_heuristics
    from data_pipeline.runner.stage import run_stage

    started = time.monotonic()
    options = HeuristicsOptions(
        thresholds=arguments.thresholds,
        signals_only=arguments.signals_only,
        secrets=arguments.secrets,
        pii=arguments.pii,
        detect_secrets=not arguments.no_detect_secrets,
    )
    stage, work = plan_heuristics(arguments.records, options)
    with stage_options(arguments, "heuristics", ("detect-secrets",)) as engine_options:
        stage = replace(stage, compress=arguments.zstd)
        manifest, reused = run_stage(stage, work, arguments.out, engine_options)
    return stage_result(arguments, manifest, reused, started)
