"""How far a stage is, on stderr: a bar on a terminal, else now and then a line of a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_SECONDS = 30.0  # between lines of progress in a log


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far a stage is.

    Yields:
        set(done, total); a total of None is not known. A stage that goes over its parts twice
        begins again at a lower number.
    """
    if not sys.stderr.isatty():
        yield _LogLines(what, unit).show
        return
    from tqdm import tqdm

    bars: list[Any] = []  # none before there is progress: not every stage shows any

    def show(done: int, total: int | None) -> None:
        if not bars:
            bars.append(tqdm(desc=what, unit=unit, file=sys.stderr))
        bars[0].total = total
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


class _LogLines:
    """Prints a line at most every `LOG_SECONDS`; short stages print none."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._began = self._said = time.monotonic()
        self._first: int | None = None  # done when the count began: what a killed run had left
        self._done = 0

    def show(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self._first is None or done < self._done:
            self._began, self._first = now if self._done else self._began, done - 1
        self._done = done
        if now - self._said < LOG_SECONDS:
            return
        self._said = now
        line = f"{self._what} {done:,}{'' if total is None else f'/{total:,}'} {self._unit}s"
        if total is not None:
            left = (total - done) * (now - self._began) / max(done - self._first, 1)
            line += f" | eta {int(left) // 3600}h{int(left) % 3600 // 60:02d}m"
        print(line, file=sys.stderr, flush=True)
