"""`megaphi data plan-generation`: what to ask a language model for."""

import argparse
from pathlib import Path
from typing import Any

from tools.data.options.executor import HelpFormatter


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    text = "lists of topics, audiences, names, ... -> a plan of what to generate"
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan-generation",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--kind", required=True, choices=("textbooks", "exercises"))
    parser.add_argument("--samples", type=int, required=True, metavar="N")
    parser.add_argument("--lists", type=Path, metavar="FILE", help="YAML: FIELD: [VALUE, ...]")
    parser.add_argument("--seed", type=int, default=1234, metavar="S")
    parser.add_argument("--out", required=True, type=Path, metavar="PLAN.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace another file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write a plan; returns the JSON result and the line of text.

    Raises:
        ValueError, FileNotFoundError: a list cannot be used, or has too few values.
    """
    from data_pipeline.generation.plan import default_lists, make_plan, read_lists, write_plan

    kind = arguments.kind.removesuffix("s")
    lists = default_lists(kind)
    if arguments.lists is not None:
        lists |= read_lists(arguments.lists, kind)
    entries = make_plan(kind, arguments.samples, lists, arguments.seed)
    count, sha256, reused = write_plan(arguments.out, entries, overwrite=arguments.overwrite)
    sizes = {field: len(values) for field, values in lists.items()}
    result = {
        "verb": "plan-generation",
        "out": str(arguments.out),
        "reused": reused,
        "samples": count,
        "lists": sizes,
        "sha256": sha256,
    }
    listed = " x ".join(f"{size} {field}" for field, size in sizes.items())
    did = "reused" if reused else "planned"
    return result, f"{did} {arguments.out}: {count} {arguments.kind} from {listed}"
