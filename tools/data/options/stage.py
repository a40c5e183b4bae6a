"""What the verbs of stages from records to records share: their options and their result."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.runner.output import Manifest
from tools.data.options.executor import HelpFormatter, add_engine, executor_of

LOG_SECONDS = 30.0  # between lines of progress in a log


def add_stage_parser(
    subparsers: Any, name: str, text: str, run: Callable[[argparse.Namespace], Any]
) -> argparse.ArgumentParser:
    """Add a verb with the arguments RECORDS_DIR... and those of every stage."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS_DIR")
    add_output(parser, max_reject=0.9)
    parser.add_argument("--zstd", action="store_true", help="write .jsonl.zst parts")
    add_engine(parser)
    parser.set_defaults(run=run)
    return parser


def add_file_verb(
    verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], Any], out: str
) -> argparse.ArgumentParser:
    """Add a verb that writes files rather than records: `--out`, `--overwrite`, `--json`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar=out, type=Path, help="what to make")
    parser.add_argument("--overwrite", action="store_true", help="replace another output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, *, max_reject: float) -> None:
    """Add the options of every verb that publishes a records directory.

    Args:
        parser: of the verb.
        max_reject: default of `--max-reject`.
    """
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="what to make")
    parser.add_argument("--overwrite", action="store_true", help="replace another output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--max-reject",
        type=float,
        default=max_reject,
        metavar="SHARE",
        help="share of refused documents, 0 to 1, above which nothing is published (exit 3)",
    )


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show how far a stage is, on stderr: a bar on a terminal, else now and then a line of a log.

    Yields:
        set(done, total); a total of None is not known. A stage that goes over its parts twice
        begins again at a lower number.
    """
    if not sys.stderr.isatty():
        yield _LogLines(what, unit).show
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, file=sys.stderr) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


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


@contextmanager
def stage_options(
    arguments: argparse.Namespace, name: str, libraries: tuple[str, ...]
) -> Iterator[Any]:
    """The engine's options from the arguments, with progress on stderr."""
    from data_pipeline.runner.stage import Options

    with progress(name, "part") as show:
        yield Options(
            executor=executor_of(arguments),
            max_reject=arguments.max_reject,
            overwrite=arguments.overwrite,
            libraries=libraries,
            on_shard=show,
        )


def stage_result(
    arguments: argparse.Namespace, manifest: Manifest, reused: bool, started: float
) -> tuple[dict[str, Any], str]:
    """The JSON object and the line that a stage's verb prints.

    Args:
        arguments: of the verb.
        manifest: of the output.
        reused: it was there already.
        started: `time.monotonic()` at the start.
    """
    seconds = max(time.monotonic() - started, 1e-9)
    result = {
        "verb": manifest.stage,
        "out": str(arguments.out),
        "reused": reused,
        "records_in": manifest.records_in,
        "records_out": manifest.records_out,
        "rejected": manifest.rejected,
        "text_bytes": manifest.text_bytes,
        "records_sha256": manifest.records_sha256,
        "seconds": round(seconds, 3),
    }
    counts = ", ".join(f"{reason} {count}" for reason, count in manifest.rejected.items())
    line = (
        f"{'reused' if reused else 'wrote'} {arguments.out}: {manifest.records_out} records, "
        f"{manifest.text_bytes / 1e6:.1f} MB | {manifest.num_rejected} rejected"
        f"{f' ({counts})' if counts else ''} of {manifest.records_in} | {seconds:.1f} s, "
        f"{manifest.text_bytes / 1e6 / seconds:.1f} MB/s"
    )
    return result, line


def seconds_and_rate(started: float, size: int) -> str:
    """`1.2 s, 25.3 MB/s` since `started` for `size` bytes."""
    seconds = max(time.monotonic() - started, 1e-9)
    return f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"


def reasons(rejected: dict[str, int]) -> str:
    """`12 rejected (empty 10, utf8 2)`."""
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} rejected" + (f" ({counts})" if counts else "")
