"""Writes the options that a message of the library names as the user typed them.

The library does not know who calls it: its messages put the field of an option in backticks, as
`max_reject`. On the command line that is `--max-reject`, in a recipe the key.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megaphi.errors import RunError


def translate(text: str, typed: Mapping[str, str]) -> str:
    """Write options as they were typed.

    Args:
        text: a message.
        typed: how each option is typed, by its field.
    """
    return re.sub(r"`(\w+)`", lambda match: typed.get(match[1], match[0]), text)


@contextmanager
def translated(typed: Mapping[str, str]) -> Iterator[None]:
    """Translate the errors that the block raises."""
    try:
        yield
    except (ValueError, RunError, OSError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (translate(error.args[0], typed),)
        raise


def flags_of(arguments: argparse.Namespace) -> dict[str, str]:
    """How the options of a parsed command line are typed, by their fields."""
    return {name: f"--{name.replace('_', '-')}" for name in vars(arguments)}
