"""Printing that outlives its reader: `megaphi train … | head` must not end a run."""

import contextlib
import os
import sys
from typing import Any


class _Unbroken:
    """A text stream that falls silent once nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or nothing."""
        with self._or_silent():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._or_silent():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_silent(self) -> Any:
        """Point a broken pipe to /dev/null, also for what is printed while Python ends."""
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let standard output and error go silent when their reader goes; metrics are still written."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Unbroken):
            setattr(sys, name, _Unbroken(getattr(sys, name)))
