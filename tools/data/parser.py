"""The verbs of `megaphi data`: one table, and the command line of each."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tools.data.stage_options import (
    add_arguments,
    flags_of_stage,
    options_of,
    read_options,
)
from tools.option_names import translated

if TYPE_CHECKING:
    from data_pipeline.runner.finished import Finished, Show

EXAMPLES = """examples:
  megaphi data ingest ~/code --out corpus/records
  megaphi data ingest bigcode/the-stack-dedup --source stack --out corpus/stack
  megaphi data tokenize corpus/records --tokenizer codegen --out corpus/train
"""


@dataclass(frozen=True)
class Verb:
    """A verb: where its options and its function are; neither is imported before it is needed.

    Attributes:
        options: `module:class` of its dataclass of options (`data_pipeline.runner.options`).
        function: `module:function` that takes it, and a function that shows the progress.
        unit: of the progress.
        extra: of `pip install 'megaphi[EXTRA]'`, which brings the packages that it imports.
    """

    options: str
    function: str
    unit: str = "part"
    extra: str = "data"

    @property
    def stage(self) -> Any:
        """The dataclass of its options."""
        return _load(self.options)

    @property
    def text(self) -> str:
        """What it does, in one line."""
        return (self.stage.__doc__ or "").splitlines()[0].removesuffix(".")

    def run(self, options: Any, show: "Show") -> "Finished":
        """Run it.

        Raises:
            ValueError: a package is not installed.
        """
        try:
            function: Callable[[Any, Show], Finished] = _load(self.function)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed: pip install 'megaphi[{self.extra}]'"
            ) from None
        return function(options, show)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _verb(room: str, options: str, function: str, **more: Any) -> Verb:
    """A verb whose options are in `options.py` of a room of data_pipeline."""
    return Verb(
        f"data_pipeline.{room}.options:{options}", f"data_pipeline.{room}.{function}", **more
    )


STAGES = {
    "ingest": _verb("ingest", "IngestRun", "stage:ingest"),
    "train-tokenizer": _verb(
        "tokens", "TrainTokenizerRun", "train_tokenizer:train_tokenizer_run", unit="B"
    ),
    "tokenize": _verb("tokens", "TokenizeRun", "tokenize_records:tokenize_run"),
    "merge": _verb("tokens", "MergeRun", "merge_tokens:merge_run"),
    "heuristics": _verb("heuristics", "HeuristicsRun", "stage:heuristics"),
    "dedup": _verb("dedup", "DedupRun", "stage:dedup_run"),
    "decontaminate": _verb("decontaminate", "DecontaminateRun", "stage:decontaminate"),
    "annotate": _verb("annotation", "AnnotateRun", "stage:annotate_run", extra="llm"),
    "compose": _verb("small_programs", "ComposeRun", "stage:compose_run"),
    "plan-generation": _verb("generation", "PlanRun", "plan:plan_run"),
    "execute": _verb("generation", "ExecuteRun", "execute:execute_run"),
    "generate": _verb("generation", "GenerateRun", "stage:generate_run", extra="llm"),
    "train-filter": _verb("quality", "TrainFilterRun", "train_filter:train_filter_run"),
    "filter": _verb("quality", "FilterRun", "filter:filter_run"),
    "report": _verb("report", "ReportRun", "build:report_run"),
    "blend": _verb("tokens", "BlendRun", "blend:blend_run"),
    "trace": _verb("tokens", "TraceRun", "trace:trace_run"),
}
"""The stages, as `--help` lists them. A new one needs an entry here and nothing more in `tools`."""

VERBS = {**STAGES, "run": Verb("tools.data.run.options:RecipeRun", "tools.data.run.command:run")}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the rest of the command are."""

    def error(self, message: str) -> NoReturn:
        """Raise the `ValueError` that the command prints as one line."""
        raise ValueError(f"{message}; see `{self.prog} --help`")


def find_verb(argv: Sequence[str]) -> Verb:
    """The verb that a command line begins with; `--help` lists all of them.

    Raises:
        ValueError: there is no such verb.
    """
    if argv and argv[0] in VERBS:
        return VERBS[argv[0]]
    listing = ""
    if any(word in ("-h", "--help") for word in argv):
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {verb.text}" for name, verb in VERBS.items()]
        listing = "\n".join(["verbs:", *lines, "", ""])
    parser = OneLineParser(
        prog="megaphi data",
        description="Build a corpus: records, tokenizer, token files.",
        epilog=listing + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="see below")
    parser.parse_args(list(argv))
    raise AssertionError("a verb that exists was not found")


def parse(verb: Verb, argv: Sequence[str]) -> tuple[Any, bool]:
    """Read the command line of a verb, its name first.

    Returns:
        Its options, and whether the result is to be printed as JSON.

    Raises:
        ValueError: the call is wrong.
    """
    name, *words = argv
    parser = make_parser(name, verb, with_help=any(word in ("-h", "--help") for word in words))
    given = vars(parser.parse_args(words))
    as_json = "json" in given
    given = {name: [value] if isinstance(value, str) else value for name, value in given.items()}
    with translated(flags_of_stage(verb.stage)):
        return read_options(verb.stage, given), as_json


def make_parser(name: str, verb: Verb, *, with_help: bool) -> argparse.ArgumentParser:
    """The parser of a verb; with the help of its options, which takes longer, only if asked."""
    parser = OneLineParser(
        prog=f"megaphi data {name}",
        description=" ".join((verb.stage.__doc__ or "").split()),
        allow_abbrev=False,
    )
    add_arguments(parser, verb.stage, with_help=with_help)
    if "json" not in options_of(verb.stage):
        text = "Print one JSON object"
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)
    return parser
