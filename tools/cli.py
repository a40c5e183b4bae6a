"""The `megaphi` command: finds the verb and runs it.

Each verb is a module of this package with `main(argv) -> int`. Verbs are imported only when they
are called, so that `megaphi --help` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from megaphi import __version__
from megaphi.errors import run_main

VERBS = {
    "data": ("tools.data.command", "build a corpus: ingest, train-tokenizer, tokenize, merge"),
    "train": ("megaphi.train", "train a recipe (the same as python -m megaphi.train)"),
    "convert": ("tools.convert", "to Hugging Face directories and GGUF files, and back"),
    "generate": ("tools.generate", "complete a prompt with a trained model"),
    "evaluate": (
        "tools.evaluation.command",
        "pass@k of a model or of completions, programs run isolated",
    ),
    "inspect": (
        "tools.inspect.command",
        "say what a token file, checkpoint or run is, and verify it",
    ),
    "plan": (
        "tools.planning.command",
        "memory, speed, days and GPU-hours of a recipe, and better layouts",
    ),
    "doctor": (
        "tools.machine.doctor",
        "what this machine has, what a run would use of it, and why",
    ),
    "preflight": (
        "tools.machine.preflight",
        "check GPUs, network and storage before the first step",
    ),
    "bench": ("tools.bench.command", "measure: data, kernels, train"),
    "reproduce": ("tools.reproduce.command", "a paper's claim as an experiment: figure"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, VERBS))
    listing = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="megaphi",
        description="Rebuild phi-1: corpus, tokens, training, conversion, scores.",
        epilog=f"verbs:\n{listing}\n\n`megaphi VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megaphi {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    debug = ["--debug"] if known.debug else []
    module_name = VERBS[known.verb][0]
    return run_main(
        lambda words: importlib.import_module(module_name).main(words), [*known.arguments, *debug]
    )


if __name__ == "__main__":
    sys.exit(main())
