"""The `megaphi` command: finds the verb, runs it, and turns errors into one line and a status.

Each verb is a module of this package with `main(argv) -> int`. Verbs are imported only when they
are called, so that `megaphi --help` answers at once.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from megaphi import __version__
from megaphi.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_REJECTS,
    EXIT_USAGE,
    Preempted,
    RunError,
    TooManyRejects,
)

VERBS = {
    "data": ("tools.data", "build a corpus: ingest, train-tokenizer, tokenize, merge"),
    "train": ("tools.train", "train a recipe (the same as python -m megaphi.train)"),
    "convert": ("tools.convert", "to and from Hugging Face model directories"),
    "generate": ("tools.generate", "complete a prompt with a trained model"),
    "inspect": ("tools.inspect", "say what a token file, checkpoint or run is, and verify it"),
    "bench": ("tools.bench", "measure: data"),
}


def run_verb(module_name: str, argv: Sequence[str]) -> int:
    """Run `main(argv)` of a verb's module and return the exit status (DESIGN §9).

    Users see one line for every error; `--debug` anywhere in `argv` shows the traceback instead.
    """
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    try:
        return int(importlib.import_module(module_name).main(arguments))
    except KeyboardInterrupt:
        print("megaphi: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Preempted as error:
        print(f"megaphi: {error}", file=sys.stderr)
        return EXIT_PREEMPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"megaphi: error: {_one_line(error)}", file=sys.stderr)
        return _exit_status(error)


def _exit_status(error: Exception) -> int:
    """Map an exception to DESIGN §9's exit status."""
    if isinstance(error, TooManyRejects):
        return EXIT_REJECTS
    if isinstance(error, RunError):
        return EXIT_FAILED
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return EXIT_USAGE
    return EXIT_FAILED


def _one_line(error: Exception) -> str:
    """The message of an error on one line; unexpected kinds are named and point to --debug."""
    expected = isinstance(error, ValueError | RunError | OSError)
    text = " ".join(str(error).split()) or "no message"
    return text if expected else f"{type(error).__name__}: {text} (--debug shows the traceback)"


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
    return run_verb(VERBS[known.verb][0], [*known.arguments, *debug])


if __name__ == "__main__":
    sys.exit(main())
