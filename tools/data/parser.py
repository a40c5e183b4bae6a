"""The command line of `megaphi data`: one parser with a sub-parser per verb."""

import argparse
from typing import Any, NoReturn

from tools.data.verbs import (
    annotate,
    blend,
    decontaminate,
    dedup,
    execute,
    filter,
    generate,
    heuristics,
    ingest,
    merge,
    plan_generation,
    report,
    tokenize,
    trace,
    train_filter,
    train_tokenizer,
)

STAGES = (
    ingest,
    train_tokenizer,
    tokenize,
    merge,
    heuristics,
    dedup,
    decontaminate,
    annotate,
    plan_generation,
    execute,
    generate,
    train_filter,
    filter,
    report,
    blend,
    trace,
)
"""In the order of `--help`; each has `add_parser`."""

EXAMPLES = """examples:
  megaphi data ingest ~/code --out corpus/records
  megaphi data ingest bigcode/the-stack-dedup --source stack --out corpus/stack
  megaphi data tokenize corpus/records --tokenizer codegen --out corpus/train
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the rest of the command are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def make_parser() -> tuple[argparse.ArgumentParser, Any]:
    """The parser of the stages' verbs, and the action to which further verbs can be added.

    `run` of what it parses runs the verb.
    """
    parser = _Parser(
        prog="megaphi data",
        description="Build a corpus: records, tokenizer, token files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for stage in STAGES:
        stage.add_parser(verbs)
    return parser, verbs
