"""`megaphi reproduce figure`: phi-1's claim as an experiment that anyone reruns.

    megaphi reproduce figure --out DIR [--scale quick|full] [--seeds N] [--labels LABELS_DIR]

What is done is kept: the same command continues where it was stopped.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaphi.durable import write_durably
from megaphi.own_packages import ROOT
from tools.data.parser import OneLineParser
from tools.reproduce.figure import CORPORA, SCALES, Arm, Plan
from tools.reproduce.jobs import Jobs, slots


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="megaphi reproduce", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="WHAT", required=True)
    text = "figure 2.1 of phi-1 in a small world: sizes, corpora, exercises"
    figure = verbs.add_parser("figure", help=text, description=text)
    figure.add_argument("--out", required=True, type=Path, metavar="DIR", help="output directory")
    figure.add_argument(
        "--scale", choices=SCALES, default="quick", help="how many models (default: quick)"
    )
    figure.add_argument("--seeds", type=int, metavar="N", help="models of each kind")
    figure.add_argument(
        "--labels", type=Path, metavar="LABELS_DIR",
        help="labels of `megaphi data annotate` for the filter; without, a stated rule",
    )  # fmt: skip
    figure.add_argument(
        "--corpus", action="append", default=[], metavar="NAME=RECORDS_DIR",
        help="a corpus of your own to pretrain on, without and with exercises; may be repeated",
    )  # fmt: skip
    figure.add_argument(
        "--jobs", type=int, metavar="N", help="steps at a time (default: one per GPU or processor)"
    )
    figure.add_argument("--list", action="store_true", help="print the commands and stop")
    figure.add_argument("--json", action="store_true", help="print one JSON object")
    figure.set_defaults(run=run_figure)
    text = "label records by a stated rule over their signals (used where no server is given)"
    labels = verbs.add_parser("labels", help=text, description=text)
    labels.add_argument("records", type=Path, metavar="RECORDS_DIR")
    labels.add_argument("--out", required=True, type=Path, metavar="DIR", help="output directory")
    labels.set_defaults(run=run_labels)
    text = "what finetuning changed: two scores, two answers (used by launch/quickstart.sh)"
    summary = verbs.add_parser("summary", help=text, description=text)
    for name, what in (
        ("before", "evaluation directory of the pretrained model"),
        ("after", "evaluation directory of the finetuned model"),
        ("suite", "the problems"),
        ("run-dir", "run directory of the pretraining"),
        ("out", "JSON file to write"),
    ):
        summary.add_argument(f"--{name}", required=True, type=Path, metavar="PATH", help=what)
    summary.add_argument("--seconds", required=True, type=float, help="time that everything took")
    summary.set_defaults(run=run_summary)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    arguments = _parser().parse_args(list(argv))
    status: int = arguments.run(arguments)
    return status


def run_labels(arguments: argparse.Namespace) -> int:
    """Write labels."""
    from tools.reproduce.labels import write_labels

    manifest, reused = write_labels(arguments.records, arguments.out)
    did = "reused" if reused else "wrote"
    print(f"{did} {arguments.out}: {manifest.records_out} records labelled by rule")
    return 0


def run_summary(arguments: argparse.Namespace) -> int:
    """Write and print a summary."""
    from tools.reproduce.summary import examples, render, summarise

    found = summarise(
        arguments.before, arguments.after, arguments.suite, arguments.run_dir, arguments.seconds
    )
    write_durably(arguments.out, json.dumps(found, indent=1) + "\n")
    print("\n".join(examples(arguments.suite, arguments.after)))
    print(render(found))
    return 0


def run_figure(arguments: argparse.Namespace) -> int:
    """Run the experiment and write `figure.json`, `.png`, `.md` and `.html`.

    Raises:
        ValueError: an option is wrong, or there is no sandbox.
        RunError: a step failed.
    """
    for name in ("seeds", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if arguments.labels is not None and not arguments.labels.is_dir():
        raise ValueError(f"--labels {arguments.labels}: no such directory")
    scale = SCALES[arguments.scale]
    if arguments.seeds is not None:
        scale = replace(scale, seeds=arguments.seeds)
    recipe = ROOT / "launch" / "recipes" / "laboratory.yaml"
    more = dict(map(_corpus, arguments.corpus))
    plan = Plan(scale, arguments.out, recipe, labels=arguments.labels, more=more)
    found = plan.jobs()
    jobs = Jobs(
        found, arguments.out / "jobs", lambda line: print(line, file=sys.stderr, flush=True)
    )
    if arguments.list:
        print("\n".join(jobs.command(job.name) for job in found))
        return 0
    if shutil.which("bwrap") is None:
        raise ValueError(
            "scores need bubblewrap, in which generated programs run; apt-get install bubblewrap"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs.run(slots(arguments.jobs))
    result = _result(plan, jobs, arguments)
    from tools.reproduce.page import write_page

    written = write_page(result, arguments.out)
    if arguments.json:
        print(json.dumps(result))
    else:
        for row in result["arms"]:
            name = f"{row['size']:>5}  {row['corpus']:<20} exercises {row['exercises']:<11}"
            print(f"{name} {row['pass_at_1']:6.1%}  ({row['low']:.1%} to {row['high']:.1%})")
        print(f"wrote {', '.join(str(path) for path in written)}")
    return 0


def _corpus(word: str) -> tuple[str, Path]:
    """A corpus of the user's own.

    Raises:
        ValueError: the word has another form, or the name is taken.
        FileNotFoundError: there are no such records.
    """
    name, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name) or name in (*CORPORA, "none", "textbooks"):
        raise ValueError(f"--corpus {word}: must be NAME=RECORDS_DIR with a new name")
    if not (Path(text) / "manifest.json").is_file():
        raise FileNotFoundError(f"--corpus {word}: {text} is no records directory")
    return name, Path(text)


def _result(plan: Plan, jobs: Jobs, arguments: argparse.Namespace) -> dict[str, Any]:
    """The scores, and what the page says about how they came about."""
    from tools.bench.machine import describe_machine
    from tools.reproduce.result import gather

    training_of = _trainings(plan)
    words = ["megaphi", "reproduce", "figure", "--scale", arguments.scale, "--out", "DIR"]
    result = gather(plan, jobs, training_of)
    result["command"] = " ".join(
        words + (["--seeds", str(plan.scale.seeds)] if arguments.seeds else [])
    )
    result["scale"] = arguments.scale
    result["labels"] = "rule" if arguments.labels is None else "server"
    result["machine"] = describe_machine(words)
    result["cpu_seconds"] = round(sum(jobs.cpu_seconds(job.name) for job in plan.jobs()), 1)
    result["pretraining_tokens"] = plan.scale.pretraining_tokens
    result["exercise_tokens"] = plan.scale.exercise_tokens
    result["rerun"] = {arm.name: [jobs.command(name) for name in names]
                       for arm, names in training_of.items()}  # fmt: skip
    return result


def _trainings(plan: Plan) -> Mapping[Arm, tuple[str, ...]]:
    """Names of the commands that make and score each arm's model, in order."""
    return {arm: tuple(job.name for job in plan.commands_of(arm)) for arm in plan.arms}
