"""How often each token file is read -> the weights of a training recipe."""

import hashlib
import json
from typing import Any

import yaml

from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import is_made
from data_pipeline.tokens.options import MAX_EPOCHS, BlendRun
from megaphi.data.dataset import split_ranges
from megaphi.data.indexed import IndexedDataset
from megaphi.durable import write_durably


def blend_run(run: BlendRun, show: Show) -> Finished:
    """Write the weights.

    Raises:
        FileNotFoundError: no such token file.
        ValueError: a number is out of range, a file has nothing to train on, or `out` is another
            file.
        TokenFileError: a token file is broken.
    """
    out = run.output.out
    split = _split(run.validation_share)
    sources = [_source(word, split) for word in run.sources]
    total = sum(source["tokens"] * source["epochs"] for source in sources)
    scale = 1.0
    if run.tokens is not None:
        scale = run.tokens / total
        most = max(source["epochs"] for source in sources) * scale
        if not most < MAX_EPOCHS:
            raise ValueError(
                f"`tokens` {run.tokens:g}: is {most:g} passes over the {total:,.0f} tokens "
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
    if out.is_dir():
        raise ValueError(f"{out}: is a directory; name the file to make")
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    reused = is_made(out, sha256, "blend", overwrite=run.output.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, text)
    options = f"--data.train='{json.dumps(train)}'"
    if split is not None:
        options += f" --data.split={split}"
    result = {
        "out": str(out),
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
    head = f"{did} {out}: {total * scale:,.0f} tokens from {len(sources)} token files"
    return Finished(result, "\n".join([head, *lines, f"megaphi train RECIPE.yaml {options}"]))


def _split(share: float | None) -> str | None:
    """Megatron's split by position: documents, shuffled when they were tokenized."""
    if share is None:
        return None
    return f"{100 * (1 - share):.10g},{100 * share:.10g},0"


def _source(word: str, split: str | None) -> dict[str, Any]:
    """A source of the command line, with the tokens of its training part."""
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
