"""Errors that end a command with one line and a known exit status.

`ValueError` and `FileNotFoundError` mean that the caller asked for something that cannot be done
(exit 2). The classes here cover the other statuses, so that a cluster script can tell "fix the
recipe" from "look at the run" from "run me again".
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REJECTS = 3
EXIT_HUNG = 4  # a process stood still and was ended by its watchdog: run me again
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class RunError(RuntimeError):
    """The call was right but the run cannot continue (exit 1): a corrupt file, a lost process."""


class TooManyRejects(RunError):
    """A corpus stage refused more records than the user allows (exit 3)."""


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint (exit 75: run me again)."""


def run_main(main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit status, turning every error into one line on stderr.

    `--debug` anywhere in `argv` is taken out and shows the traceback as well.
    """
    debug = "--debug" in argv
    try:
        return int(main([argument for argument in argv if argument != "--debug"]))
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Preempted as error:
        _say(str(error))
        return EXIT_PREEMPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {_one_line(error)}")
        return _exit_status(error)


def _say(message: str) -> None:
    """Print a line on stderr; with several processes it says which one speaks."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"megaphi{f' [rank {rank}]' if rank else ''}: {message}", file=sys.stderr, flush=True)


def _exit_status(error: Exception) -> int:
    """Map an exception to its exit status."""
    if isinstance(error, TooManyRejects):
        return EXIT_REJECTS
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return EXIT_USAGE
    return EXIT_FAILED


def _one_line(error: Exception) -> str:
    """The message of an error on one line; unexpected kinds are named and point to --debug."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, ValueError | RunError | OSError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows the traceback)"
