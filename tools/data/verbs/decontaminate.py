"""`megaphi data decontaminate`: take out documents that hold problems of a benchmark."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.data.options.stage import add_stage_parser, stage_options, stage_result


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> records without problems of benchmarks, and report.json, report.txt"
    parser = add_stage_parser(subparsers, "decontaminate", text, run)
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="HumanEval, MBPP or another benchmark: .jsonl, .jsonl.gz or .jsonl.zst",
    )
    parser.add_argument("--id-field", default="", metavar="FIELD", help="default: task_id")
    parser.add_argument(
        "--text-field",
        action="append",
        default=[],
        metavar="FIELD",
        help="prose of a problem, may be repeated; default: prompt or text",
    )
    parser.add_argument(
        "--code-field",
        default="",
        metavar="FIELD",
        help="solution; default: canonical_solution, code or solution",
    )
    parser.add_argument(
        "--ngram", type=int, default=13, metavar="N", help="words in a row that betray; 0: off"
    )
    parser.add_argument("--no-ast", action="store_true", help="do not compare functions")
    parser.add_argument(
        "--tau",
        type=float,
        nargs="+",
        default=[0.95, 0.9, 0.85, 0.8],
        metavar="T",
        help="AST match rates that are reported",
    )
    parser.add_argument(
        "--drop-at", type=float, default=0.95, metavar="T", help="match rate that rejects"
    )
    parser.add_argument(
        "--min-nodes", type=int, default=12, metavar="N", help="smallest solution compared"
    )
    parser.add_argument(
        "--embedding-model",
        metavar="hashed|DIR",
        help="compare embeddings too: of a run, checkpoint or Hugging Face directory",
    )
    parser.add_argument(
        "--embedding-distance",
        type=float,
        metavar="T",
        help="distance of normalised embeddings, 0 to 2, up to which a document is rejected",
    )
    parser.add_argument(
        "--embedding-tokens", type=int, default=1024, metavar="N", help="of a text that are read"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the lines to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_decontaminate` and `run_stage`.
    """
    from data_pipeline.decontaminate.benchmarks import Fields
    from data_pipeline.decontaminate.report import read_report, report_text
    from data_pipeline.decontaminate.stage import DecontaminateOptions, plan_decontaminate
    from data_pipeline.runner.stage import run_stage

    started = time.monotonic()
    options = DecontaminateOptions(
        against=tuple(arguments.against),
        fields=Fields(
            id=arguments.id_field, text=tuple(arguments.text_field), code=arguments.code_field
        ),
        ngram=arguments.ngram,
        ast=not arguments.no_ast,
        taus=tuple(arguments.tau),
        drop_at=arguments.drop_at,
        min_nodes=arguments.min_nodes,
        embedding_model=arguments.embedding_model,
        embedding_distance=arguments.embedding_distance,
        embedding_tokens=arguments.embedding_tokens,
    )
    stage, work = plan_decontaminate(arguments.records, options)
    with stage_options(arguments, "decontaminate", ("rapidfuzz",)) as engine_options:
        stage = replace(stage, compress=arguments.zstd)
        manifest, reused = run_stage(stage, work, arguments.out, engine_options)
    report = read_report(arguments.out)
    result, line = stage_result(arguments, manifest, reused, started)
    return result | {"report": report}, f"{line}\n{report_text(report)}"
