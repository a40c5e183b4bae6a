"""Exceptions that end a command with one line and a known exit status.

`ValueError` and `FileNotFoundError` mean that the caller asked for something that cannot be done
(exit 2). The classes here cover the other statuses, so that a cluster script can tell "fix the
recipe" from "look at the run" from "run me again".
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REJECTS = 3
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class RunError(RuntimeError):
    """The call was right but the run cannot go on (exit 1): a corrupt file, a lost process."""


class TooManyRejects(RunError):
    """A corpus stage refused more records than `--max-reject` allows (exit 3)."""


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint (exit 75: run me again)."""
