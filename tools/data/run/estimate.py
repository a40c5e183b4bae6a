"""`megaphi data run --estimate`: hours and dollars of a corpus recipe, before anything is spent.

Each stage's work is the declared size of what it reads; `MB_PER_CPU_SECOND` is what was measured,
with the file in `docs/benchmarks` that says where and how. Prices are the user's: of a processor
hour in the recipe, of tokens among the options of the stages that ask a language model.
"""

from collections.abc import Mapping
from typing import Any

from data_pipeline.ingest.sources import find_source
from data_pipeline.runner.executors import cores
from data_pipeline.runner.finished import Finished
from tools.data.run.recipe import CorpusRecipe, StageCall
from tools.data.stage_options import values_of

_STAGES = "docs/benchmarks/data-stages-2core.txt"
# MB of text read a second of one processor, and where it was measured.
MB_PER_CPU_SECOND: dict[str, tuple[float, str]] = {
    "ingest": (31.5, _STAGES),
    "heuristics": (3.7, _STAGES),
    "dedup": (12.6, _STAGES),
    "decontaminate": (1.9, _STAGES),
    "report": (1.0, _STAGES),
    "filter": (4.1, _STAGES),
    "train-tokenizer": (2.0, _STAGES),
    "tokenize": (16.0, "docs/benchmarks/data-2core.txt"),
}
_ASKING = ("annotate", "generate")  # a language model
# Stages that only read counts, or copy.
_CHEAP = ("plan-generation", "blend", "merge")
# Stages whose output is no text that the stages after them read.
_NO_TEXT = (*_CHEAP, "train-tokenizer", "train-filter", "report", "tokenize")
BYTES_PER_TOKEN = 3.6  # of Python by the CodeGen tokenizer, where a stage declares tokens alone
_TABLE = "{:<{width}}  {:<15}  {:>9}  {:>10}  {:>10}  {:>10}  {}"


def estimate(recipe: CorpusRecipe, workers: int | None) -> Finished:
    """Estimate a recipe.

    Args:
        recipe: with `expect` at its stages.
        workers: processors; None for those of this machine.

    Returns:
        A row per stage. What cannot be known is None, `n/a`: no size
        declared, no rate measured, no price given.
    """
    workers = workers or cores()
    sizes: dict[str, float | None] = {}
    rows: list[dict[str, Any]] = []
    for call in recipe.stages:
        sizes[call.name] = _size(call, sizes)
        if call.verb in _ASKING:
            rows.append(_asked(call))
        else:
            rows.append(_computed(recipe, call, sizes, workers))
    total = _total(rows)
    if "cpu_hour" not in recipe.prices:
        total["why"] += "; give `prices: {cpu_hour: DOLLARS}` in the recipe"
    result = {"verb": "estimate", "workers": workers, "stages": rows, "total": total}
    return Finished(result, _table([*rows, total], workers))


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row. A sum without what is not known says so; one of nothing is None, not 0."""
    total: dict[str, Any] = {"stage": "in all", "verb": "", "gigabytes": None}
    lacking = []
    for key, name in (("cpu_hours", "CPU-hours"), ("hours", "hours"), ("dollars", "dollars")):
        total[key] = sum(row[key] for row in rows if row[key] is not None) or None
        # A stage that waits for a server needs no processor to speak of.
        asking = _ASKING if key == "cpu_hours" else ()
        missing = sum(row[key] is None and row["verb"] not in asking for row in rows)
        if missing:
            lacking.append(f"{name} of {missing}")
        elif total[key] is None:
            total[key] = 0.0
    total["why"] = f"without the {', the '.join(lacking)} stages" if lacking else "all known"
    return total


def _size(call: StageCall, sizes: Mapping[str, float | None]) -> float | None:
    """Gigabytes of text that a stage gives: declared, or those of what it reads."""
    if call.verb in _NO_TEXT:
        return 0.0
    if "gigabytes" in call.expect:
        return call.expect["gigabytes"]
    if "tokens" in call.expect:
        return call.expect["tokens"] * BYTES_PER_TOKEN / 1e9
    return _source_size(call) if call.verb == "ingest" else _read(call, sizes)


def _source_size(call: StageCall) -> float | None:
    """Gigabytes of the sources of an ingest stage; None where a file is not here, or compressed."""
    try:
        run = call.options
        sources = [find_source(word, word, run.options.exclude) for word in run.sources]
    except (ValueError, FileNotFoundError):
        return None
    files = [file for source in sources for file in source.files if not file.refused]
    if any(file.kind != "python" and not file.path.endswith(".jsonl") for file in files):
        return None
    return sum(file.size for file in files) / 1e9


def _read(call: StageCall, sizes: Mapping[str, float | None]) -> float | None:
    """Gigabytes of text that a stage reads from its inputs; None where one declares nothing."""
    known = [sizes[name] for name in call.inputs]
    if not known or any(size is None for size in known):
        return None
    return sum(size for size in known if size is not None)


def _row(call: StageCall, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("gigabytes", "cpu_hours", "hours", "dollars"))
    return {"stage": call.name, "verb": call.verb, **empty, "why": "", **values}


def _computed(
    recipe: CorpusRecipe, call: StageCall, sizes: Mapping[str, float | None], workers: int
) -> dict[str, Any]:
    """A stage of processors."""
    gigabytes = sizes[call.name] if call.verb == "ingest" else _read(call, sizes)
    if call.verb in _CHEAP:
        return _row(call, cpu_hours=0.0, hours=0.0, dollars=0.0, why="next to nothing")
    models = [
        other.name
        for other in [call, *(each for each in recipe.stages if each.name in call.inputs)]
        if values_of(other.options).get("features", "hashed") != "hashed"
    ]
    if models:
        return _row(call, gigabytes=gigabytes, why="depends on the embedding model and its GPU")
    if call.verb not in MB_PER_CPU_SECOND:
        return _row(call, gigabytes=gigabytes, why="no rate was measured")
    rate, source = MB_PER_CPU_SECOND[call.verb]
    if gigabytes is None:
        return _row(call, why="declare expect: {gigabytes: N} at its inputs")
    cpu_hours = gigabytes * 1000 / rate / 3600
    price = recipe.prices.get("cpu_hour")
    return _row(
        call,
        gigabytes=gigabytes,
        cpu_hours=cpu_hours,
        hours=cpu_hours / (1 if call.verb == "train-tokenizer" else workers),
        dollars=None if price is None else cpu_hours * price,
        why=f"{rate:g} MB per CPU-second, {source}",
    )


def _asked(call: StageCall) -> dict[str, Any]:
    """A stage that asks a language model."""
    prompt, completion = (call.expect.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
    if prompt is None or completion is None:
        return _row(call, why="declare expect: {prompt_tokens: N, completion_tokens: N}")
    dollars, hours = None, None
    money, speed = call.options.asking.money, call.options.asking.sending.tokens_per_minute
    if money.price_in is not None and money.price_out is not None:
        dollars = (prompt * money.price_in + completion * money.price_out) / 1e6
    if speed:
        hours = (prompt + completion) / speed / 60
    why = f"{prompt / 1e6:g} M prompt, {completion / 1e6:g} M completion tokens"
    if dollars is None:
        why += "; give price_in and price_out"
    if hours is None:
        why += "; give tokens_per_minute"
    return _row(call, cpu_hours=None, hours=hours, dollars=dollars, why=why)


def _table(rows: list[dict[str, Any]], workers: int) -> str:
    def number(value: float | None) -> str:
        if value is None:
            return "n/a"
        return f"{value:.1g}" if 0 < value < 0.1 else f"{value:,.2f}"

    width = max(len(row["stage"]) for row in rows)
    names = ("stage", "verb", "GB", "CPU-hours", "hours", "dollars", f"on {workers} processors")
    lines = [_TABLE.format(*names, width=width)]
    for row in rows:
        numbers = [number(row[key]) for key in ("gigabytes", "cpu_hours", "hours", "dollars")]
        lines.append(_TABLE.format(row["stage"], row["verb"], *numbers, row["why"], width=width))
    return "\n".join(line.rstrip() for line in lines)
