"""`megaphi data blend`: how often each token file is read -> the weights of a training recipe."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from tools.data.options.executor import HelpFormatter

MAX_EPOCHS = 1e6  # more is a slip: of a unit, or of a digit


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "token files and how often each is read -> weights for `megaphi train`"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "blend",
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="PREFIX=EPOCHS",
        help="a token file and its number of passes; =1 may be left out",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="train on this many; the epochs then are proportions",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="of the documents of each file, from its end, to validate on",
    )
    parser.add_argument("--out", required=True, metavar="FILE.yaml", type=Path, help="what to make")
    parser.add_argument("--overwrite", action="store_true", help="replace another file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the lines to print.

    Raises:
        FileNotFoundError: no such token file.
        ValueError: a number is out of range, a file has nothing to train on, or `--out` is another
            file.
        TokenFileError: a token file is broken.
    """
    import yaml

    from data_pipeline.runner.output import is_made
    from megaphi.durable import write_durably

    split = _split(arguments.validation_share)
    sources = [_source(word, split) for word in arguments.sources]
    total = sum(source["tokens"] * source["epochs"] for source in sources)
    scale = 1.0
    if arguments.tokens is not None:
        if not arguments.tokens >= 1:
            raise ValueError(f"--tokens {arguments.tokens:g}: at least 1 is needed")
        scale = arguments.tokens / total
        most = max(source["epochs"] for source in sources) * scale
        if not most < MAX_EPOCHS:
            raise ValueError(
                f"--tokens {arguments.tokens:g}: is {most:g} passes over the {total:,.0f} tokens "
                f"that the sources give in one; fewer than {MAX_EPOCHS:g} are allowed"
            )
    train: list[str | float] = []
    for source in sources:
        share = source["tokens"] * source["epochs"] / total
        source["epochs"] *= scale
        source["weight"] = float(f"{share:.6g}")
        train += [source["weight"], source["prefix"]]
    data = {"train": train} | ({} if split is None else {"split": split})
    text = (
        f"# data of a training recipe: {total * scale:,.0f} training tokens in all\n"
        + yaml.safe_dump({"data": data}, sort_keys=False)
    )
    if arguments.out.is_dir():
        raise ValueError(f"{arguments.out}: is a directory; name the file to make")
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    reused = is_made(arguments.out, sha256, "blend", overwrite=arguments.overwrite)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(arguments.out, text)
    options = f"--data.train='{json.dumps(train)}'"
    if split is not None:
        options += f" --data.split={split}"
    result = {
        "verb": "blend",
        "out": str(arguments.out),
        "reused": reused,
        "sources": sources,
        "tokens": round(total * scale),
        "options": options,
    }
    width = max(len(source["prefix"]) for source in sources)
    lines = [
        f"{source['prefix']:<{width}}  {source['tokens']:>15,} tokens  "
        f"{source['epochs']:8.3f} epochs  weight {source['weight']:.6g}"
        for source in sources
    ]
    did = "reused" if reused else "blended"
    head = f"{did} {arguments.out}: {total * scale:,.0f} tokens from {len(sources)} token files"
    return result, "\n".join([head, *lines, f"megaphi train RECIPE.yaml {options}"])


def _split(share: float | None) -> str | None:
    """Megatron's split by position: documents, shuffled when they were tokenized."""
    if share is None:
        return None
    if not 0 < share < 1:
        raise ValueError(f"--validation-share {share:g}: must be between 0 and 1")
    return f"{100 * (1 - share):.10g},{100 * share:.10g},0"


def _source(word: str, split: str | None) -> dict[str, Any]:
    """A source of the command line, with the tokens of its training part."""
    from megaphi.data.dataset import split_ranges
    from megaphi.data.indexed import IndexedDataset

    prefix, equals, text = word.rpartition("=")
    prefix, text = (prefix, text) if equals else (word, "1")
    try:
        epochs = float(text)
    except ValueError:
        raise ValueError(f"{word}: must be PREFIX=EPOCHS, such as {prefix}=4") from None
    if not 0 < epochs < MAX_EPOCHS:
        raise ValueError(f"{word}: epochs must be above 0 and below {MAX_EPOCHS:g}")
    indexed = IndexedDataset(prefix)
    bounds = (0, len(indexed)) if split is None else split_ranges(split, len(indexed))[0]
    tokens = 0 if bounds is None else int(indexed.lengths[slice(*bounds)].sum())
    if not tokens:
        raise ValueError(f"{prefix}: has no token to train on")
    return {"prefix": prefix, "tokens": tokens, "epochs": epochs}
