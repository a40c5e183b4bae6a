"""`megaphi data ingest`: raw files, archives, dumps and data sets become records."""

import argparse
import time
from typing import Any

from tools.data.options.executor import HelpFormatter, add_engine
from tools.data.options.stage import add_output, stage_options, stage_result


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "raw files and data sets -> records"
    parser = subparsers.add_parser(
        "ingest",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="directory of .py files (beside which data files are rejected) or of data files; .py, "
        ".jsonl, .jsonl.zst or .parquet file; .zip, .tar, .tar.gz, .tar.xz, .tar.bz2, .tar.zst or "
        ".7z archive of such; Posts.xml of a Stack Exchange dump, or its .7z; directory saved by "
        "`datasets`; OWNER/NAME[:SPLIT] on the Hugging Face hub",
    )
    add_output(parser, max_reject=0.5)
    parser.add_argument(
        "--source",
        metavar="LABEL",
        help="label of the records, instead of stack, stackoverflow, code_contests or local",
    )
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", "stack", "code-contests", "stackoverflow"),
        help="what the sources are; auto looks at their content",
    )
    parser.add_argument("--text-field", metavar="FIELD", help="instead of content, text or code")
    parser.add_argument("--min-bytes", type=int, default=1, metavar="N", help="smallest document")
    parser.add_argument("--max-bytes", type=int, default=2**20, metavar="N", help="largest")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out files and folders of this name or shell pattern; may be repeated",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N documents")
    parser.add_argument("--zstd", action="store_true", help="write .jsonl.zst parts")
    _add_rights(parser)
    _add_questions(parser)
    add_engine(parser)
    parser.set_defaults(run=run)


def _add_rights(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("licences and removals")
    group.add_argument(
        "--licenses",
        metavar="FILE|permissive",
        help="keep only documents under these SPDX licences, one identifier a line; `permissive` "
        "is the shipped list; a document of unknown licence is rejected",
    )
    group.add_argument(
        "--opt-out",
        metavar="FILE",
        help="reject documents of these repositories, one OWNER/NAME or OWNER/ a line",
    )


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions, answers and contests")
    group.add_argument(
        "--tags",
        default="python",
        metavar="TAG[,TAG...]",
        help="of Stack Exchange: questions with one of these",
    )
    group.add_argument(
        "--min-score",
        type=int,
        default=1,
        metavar="N",
        help="lowest score of an answer that was not accepted",
    )
    group.add_argument("--max-answers", type=int, default=3, metavar="N", help="of a question")
    group.add_argument(
        "--site", default="stackoverflow.com", metavar="HOST", help="that the dump is of"
    )
    group.add_argument(
        "--max-solutions", type=int, default=3, metavar="N", help="of a contest problem"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_ingest` and `run_stage`.
    """
    from dataclasses import replace

    from data_pipeline.ingest.licenses import FilterFiles
    from data_pipeline.ingest.stage import IngestOptions, plan_ingest
    from data_pipeline.runner.stage import run_stage

    started = time.monotonic()
    stage, work = plan_ingest(
        arguments.sources,
        IngestOptions(
            source=arguments.source,
            format=arguments.format,
            text_field=arguments.text_field,
            min_bytes=arguments.min_bytes,
            max_bytes=arguments.max_bytes,
            limit=arguments.limit,
            exclude=arguments.exclude,
            filters=FilterFiles(arguments.licenses, arguments.opt_out),
            tags=[tag.strip() for tag in arguments.tags.split(",") if tag.strip()],
            min_score=arguments.min_score,
            max_answers=arguments.max_answers,
            site=arguments.site,
            max_solutions=arguments.max_solutions,
        ),
        arguments.out,
    )
    libraries = ("pyarrow", "datasets", "zstandard", "py7zr")
    with stage_options(arguments, "ingest", libraries) as options:
        stage = replace(stage, compress=arguments.zstd)
        manifest, reused = run_stage(stage, work, arguments.out, options)
    result, line = stage_result(arguments, manifest, reused, started)
    return result, line if reused else line.replace("wrote", "ingested", 1)
