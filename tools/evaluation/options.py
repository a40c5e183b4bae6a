"""The command line of `megaphi evaluate`."""

import argparse
from pathlib import Path

from data_pipeline.sandbox.executor import usable_processors
from tools.evaluation.perturb import FAMILIES
from tools.model_options import add_generation_options


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The options of the verb, under its description."""
    parser = argparse.ArgumentParser(
        prog="megaphi evaluate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is evaluated: one of these")
    what.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint or directory")
    what.add_argument(
        "--completions", type=Path, metavar="FILE",
        help="JSON lines with task_id and completion (or evalplus's solution), or bigcode's lists",
    )  # fmt: skip
    what.add_argument(
        "--canonical", action="store_true", help="the suite's own solutions (a check)"
    )
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two finished evaluations, paired"
    )
    parser.add_argument("--suite", help="humaneval, mbpp or FILE.jsonl")
    parser.add_argument("--suite-file", type=Path, metavar="FILE", help="data of humaneval or mbpp")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the results (of a run: RUN/evaluations/SUITE)"
    )
    parser.add_argument(
        "--perturb", choices=(*FAMILIES, "all"), action="append", metavar="FAMILY",
        help=f"score the suite perturbed as well: {', '.join(FAMILIES)} or all",
    )  # fmt: skip
    parser.add_argument("--similarity", type=Path, metavar="FILE.json", help="split the score")
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="default: of 1, 10 and 100 what --samples allows",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    sampling = parser.add_argument_group("generation")
    add_generation_options(sampling, max_new_tokens=512, batch_size=32)
    run = parser.add_argument_group("the checkpoints of a run")
    run.add_argument("--all-checkpoints", action="store_true", help="each of the run MODEL")
    run.add_argument("--tensorboard", action="store_true", help="draw them into the run's")
    run.add_argument(
        "--follow", action="store_true", help="both, as they are published, until the last"
    )
    run.add_argument("--every-steps", type=int, default=1, metavar="N", help="only steps N divides")
    run.add_argument("--poll-seconds", type=float, default=30.0, metavar="S")
    run.add_argument(
        "--patience-seconds", type=float, default=3600.0, metavar="S",
        help="give up following when nothing changes in the run for so long (default: an hour)",
    )  # fmt: skip
    programs = parser.add_argument_group("running programs")
    programs.add_argument("--workers", type=int, default=usable_processors(), metavar="N")
    programs.add_argument(
        "--timeout", type=float, default=3.0, metavar="SECONDS",
        help="processor time; a program that only waits is stopped after three times as long",
    )  # fmt: skip
    programs.add_argument(
        "--package", action="append", metavar="NAME",
        help="that programs and tests may import, again for another; '' for none "
        "(default: numpy, where it is installed)",
    )  # fmt: skip
    programs.add_argument("--memory-mib", type=int, default=1024, metavar="N")
    programs.add_argument("--unsafe-no-sandbox", action="store_true")
    return parser
