"""`megaphi inspect TARGET`: say what something on disk is, and whether it is whole.

TARGET is a token file (its prefix, .bin or .idx), a checkpoint, a run, the output of a
`megaphi data` stage, or a Hugging Face model directory. What can be checked without reading
everything is always checked: the structure of an index, the size of every file, the hashes of small
files. `--deep` reads every byte. Exit status: 0 whole, 1 damaged (the file is named), 2 there is
nothing of these kinds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaphi.errors import RunError

_MAX_TEXT = 400  # characters of one value in the text form


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status.

    Raises:
        FileNotFoundError: there is nothing at TARGET.
        ValueError: it is of no known kind, or an option does not fit it.
        RunError: it is damaged; what could still be read was printed.
    """
    options = _parser().parse_args(argv)
    kind, path = find_target(options.target)
    if options.head and kind != "tokens":
        raise ValueError(f"--head shows documents of a token file; {path} is a {kind}")
    if options.plot and kind != "run":
        raise ValueError(f"--plot draws a run; {path} is a {kind}")
    report: dict[str, Any] = {"kind": kind, "path": path}
    try:
        report |= _describe(kind, path, options)
    except RunError as error:
        if options.json:
            print(json.dumps(report | {"problem": str(error)}))
        raise
    print(json.dumps(report) if options.json else "\n".join(_lines(report)))
    damaged = [entry["problem"] for entry in report.get("checkpoints", []) if "problem" in entry]
    if damaged:
        more = f" (and {len(damaged) - 1} more damaged checkpoints)" if len(damaged) > 1 else ""
        raise RunError(damaged[0] + more)
    return 0


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megaphi inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="token file prefix or directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--deep", action="store_true", help="read and verify every byte")
    parser.add_argument(
        "--head",
        type=int,
        default=0,
        metavar="N",
        help="show the first N documents of a token file",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw a run: loss, gradient norm, learning rate, tokens/s, and what interrupted it",
    )
    return parser


def find_target(target: str) -> tuple[str, str]:
    """Decide what a TARGET is, by the files that are there.

    A directory that is none of the kinds does not hide a token file of the same name.

    Returns:
        The kind (tokens, checkpoint, run, records, tokenizer, huggingface), and the path: for a
        token file its prefix.

    Raises:
        FileNotFoundError: nothing has that name.
        ValueError: it is none of the kinds.
    """
    path = Path(target)
    kind = _directory_kind(path) if path.is_dir() else None
    if kind is not None:
        return kind, str(path)
    suffix = path.suffix if path.suffix in (".bin", ".idx") else ""
    for prefix in (target, target.removesuffix(suffix)):
        if any(Path(f"{prefix}{ending}").is_file() for ending in (".bin", ".idx")):
            return "tokens", prefix
    if not path.exists():
        raise FileNotFoundError(
            f"{target}: no such directory, and no such token file ({target}.idx)"
        )
    raise ValueError(
        f"{target}: not a token file (.bin and .idx), checkpoint or records (manifest.json), run "
        "(step-… directories or metrics.jsonl) or Hugging Face model (config.json)"
    )


def _directory_kind(directory: Path) -> str | None:
    """What a directory is; None if it is nothing that we know."""
    is_checkpoint = (directory / "model.json").is_file()
    if (directory / "manifest.json").is_file() and not is_checkpoint:
        if (directory / "tokenizer.json").is_file():
            return "tokenizer"
        tensors = next(directory.glob("*.safetensors"), None)
        return "records" if tensors is None else "checkpoint"
    if is_checkpoint:
        return "checkpoint"
    if (directory / "metrics.jsonl").is_file() or any(directory.glob("step-[0-9]*")):
        return "run"
    return "huggingface" if (directory / "config.json").is_file() else None


def _describe(kind: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build the report; each kind imports only what it needs."""
    if kind == "tokens":
        from tools.inspect.data import describe_tokens

        return describe_tokens(path, deep=options.deep, head=options.head)
    if kind in ("records", "tokenizer"):
        from tools.inspect.data import describe_records, describe_tokenizer

        if kind == "tokenizer":
            return describe_tokenizer(Path(path))
        return describe_records(Path(path), deep=options.deep)
    from tools.inspect.model import (
        describe_checkpoint,
        describe_hugging_face,
        describe_run_directory,
    )

    if kind == "huggingface":
        return describe_hugging_face(Path(path), deep=options.deep)
    describe = describe_run_directory if kind == "run" else describe_checkpoint
    report = describe(Path(path), deep=options.deep)
    if options.plot:
        from tools.inspect.plot import plot_run

        report |= plot_run(Path(path), options.plot)
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    """A report as text: one aligned line for each entry, lists of objects below their name."""
    entries = {key: value for key, value in report.items() if key not in ("kind", "path")}
    width = max(map(len, entries))
    lines = [f"{report['kind']} {report['path']}"]
    for key, value in entries.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
        shown = f"{len(rows)}" if rows is not None else _text(value)
        lines.append(f"  {key.replace('_', ' '):<{width}}  {shown}")
        lines.extend(f"    {_row(row)}" for row in rows or [])
    return lines


def _row(row: dict[str, Any]) -> str:
    """One object of a list on one line; the text of a document follows on lines of its own."""
    pairs = [f"{key.replace('_', ' ')} {_text(row[key])}" for key in row if key != "text"]
    text = row.get("text")
    lines = [] if text is None else text.expandtabs(4).split("\n")
    body = [f"      | {printable(line)}" for line in lines]
    return "\n".join([", ".join(pairs), *body])


def _text(value: Any) -> str:
    """One value for people."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list | dict):
        nested = value.values() if isinstance(value, dict) else value
        if any(isinstance(item, list | dict) for item in nested):
            text = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, dict):
            text = ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
        else:
            text = ", ".join(map(str, value)) or "none"
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … (--json shows all)"


def printable(text: str) -> str:
    """Text without control characters: a file must not be able to drive the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
