"""`megaphi bench data`: how fast text becomes tokens, tokens an order, and the order batches.

Every repeat of every measurement is a process of its own, and megaphi and its peers take turns, so
that whatever else the machine is doing hits them alike. Where a peer does the same work, the
results are compared as well: a figure for another result would mean nothing.
"""

import argparse
import json
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphi.errors import RunError
from tools.bench import package_version, run_child
from tools.bench_measures import BLEND_WEIGHTS, MICRO_BATCH_SIZE, SEQUENCE_LENGTH


@dataclass(frozen=True)
class _Tool:
    """One row: what is measured, and the distribution that it needs (None: ours)."""

    label: str
    measure: str
    package: str | None = None


@dataclass(frozen=True)
class _Group:
    """Rows that do the same work; the first is ours, the ratios are to it.

    A rate is amount / seconds / scale, in `unit`.
    """

    name: str
    unit: str
    scale: float
    tools: tuple[_Tool, ...]
    shows_memory: bool = False


_GROUPS = (
    _Group(
        "tokenize",
        "MB/s",
        1e6,
        (
            _Tool("megaphi: records -> .bin, .idx on disk", "tokenize_megaphi"),
            _Tool("tokenizers: encode_batch_fast in memory", "tokenize_tokenizers", "tokenizers"),
            _Tool("gigatoken: encode_batch in memory", "tokenize_gigatoken", "gigatoken"),
        ),
    ),
    _Group(
        "sample order",
        "M tokens/s",
        1e6,
        (
            _Tool("megaphi: build_sample_order", "index_megaphi"),
            _Tool("Megatron-Core: GPTDataset indices", "index_megatron", "megatron-core"),
        ),
        shows_memory=True,
    ),
    _Group(
        "blend order",
        "M samples/s",
        1e6,
        (
            _Tool("megaphi: blend_order", "blend_megaphi"),
            _Tool("Megatron-Core: build_blending_indices", "blend_megatron", "megatron-core"),
        ),
        shows_memory=True,
    ),
    _Group(
        "loader",
        "samples/s",
        1.0,
        (
            _Tool("megaphi: Loader, micro-batches of 8", "loader_megaphi"),
            _Tool("Megatron-Core: GPTDataset[k], one by one", "loader_megatron", "megatron-core"),
        ),
    ),
)


def run_data(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Take all measurements.

    Returns:
        The report and its table.

    Raises:
        ValueError: a size is not positive, or the source has no Python files.
        FileNotFoundError: there is no such source or tokenizer.
        RunError: a measurement of our own failed.
    """
    _check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.out) as name:
        work = Path(name)
        corpus = _prepare(options, work)
        request = {
            "records": str(work / "records"),
            "tokenizer": str(options.tokenizer),
            "tokenizer_file": str(work / "tokenizer" / "tokenizer.json"),
            "prefix": str(work / "tokens"),
            "workers": options.workers,
            "index_tokens": int(options.index_tokens),
            "blend_samples": int(options.blend_samples),
            "loader_samples": options.loader_samples,
        }
        groups = [_run_group(group, request, work, options.repeats) for group in _GROUPS]
        info = json.loads((work / "tokens.json").read_bytes())
    corpus |= {"tokens": info["num_tokens"], "backend": _backend(info)}
    settings = {
        "repeats": options.repeats,
        "workers": options.workers,
        "tokenizer": str(options.tokenizer),
        "index_tokens": int(options.index_tokens),
        "blend_samples": int(options.blend_samples),
        "blend_weights": BLEND_WEIGHTS,
        "loader_samples": options.loader_samples,
        "sequence_length": SEQUENCE_LENGTH,
    }
    report = {"settings": settings, "corpus": corpus, "groups": groups}
    return report, _table(report)


def _check(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for a size that cannot be measured."""
    least = {"megabytes": 0.01, "index_tokens": 10_000, "blend_samples": 1}
    least |= {"loader_samples": MICRO_BATCH_SIZE, "repeats": 1, "workers": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if not smallest <= value < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value:g}: at least {smallest:g} is needed")


def _prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Copy the source's first files, ingest them, and save the tokenizer; describe the corpus."""
    from data_pipeline.engine import Options, run_stage
    from data_pipeline.ingest import IngestOptions, plan_ingest
    from data_pipeline.tokenizer import load_tokenizer

    load_tokenizer(options.tokenizer).save(work / "tokenizer")
    source = options.source or Path(sysconfig.get_path("stdlib"))
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such directory")
    left = options.megabytes * 1e6
    for file in _python_files(source):
        target = work / "source" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        left -= file.stat().st_size
        if left <= 0:
            break
    if not (work / "source").is_dir():
        raise ValueError(f"{source}: holds no .py files")
    stage, shards = plan_ingest([str(work / "source")], IngestOptions(source="bench"))
    manifest, _ = run_stage(stage, shards, work / "records", Options(max_reject=1.0))
    return {
        "source": str(options.source or "the standard library of Python"),
        "documents": manifest.records_out,
        "text_bytes": manifest.text_bytes,
    }


def _python_files(source: Path) -> Iterator[Path]:
    """The .py files below a directory in a fixed order, without installed packages and links."""
    for path in sorted(source.rglob("*.py")):
        inside = path.relative_to(source).parts
        if "site-packages" not in inside and path.is_file() and not path.is_symlink():
            yield path


def _backend(info: dict[str, Any]) -> str:
    """The library that our tokenizing used."""
    libraries = [name for name in info["recipe"]["libraries"] if name != "python"]
    return ", ".join(libraries) or "unknown"


def _run_group(group: _Group, request: dict[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    """Measure the rows of a group in turns and set them against ours."""
    versions = {tool: tool.package and package_version(tool.package) for tool in group.tools}
    results: dict[_Tool, list[dict[str, Any]]] = {tool: [] for tool in group.tools}
    problems: dict[_Tool, str] = {}
    for repeat in range(repeats):
        for tool in group.tools:
            if tool in problems:
                continue
            if tool.package is not None and versions[tool] is None:
                problems[tool] = "not installed"
                continue
            print(f"{repeat + 1}/{repeats} {tool.label}", file=sys.stderr, flush=True)
            try:
                results[tool].append(_measure(tool, request, work))
            except RunError as error:
                if tool.package is None:
                    raise
                problems[tool] = f"failed: {error}"
    ours = _sum_up(group, results[group.tools[0]])
    rows = []
    for tool in group.tools:
        row: dict[str, Any] = {"name": tool.label, "package": tool.package}
        row["version"] = versions[tool]
        if tool in problems:
            row["problem"] = problems[tool]
        else:
            row |= _sum_up(group, results[tool])
        if tool.package is not None and tool not in problems:
            row["megaphi_ratio"] = ours["rate"] / row["rate"]
            row["same_result"] = results[tool][0]["digest"] == results[group.tools[0]][0]["digest"]
        rows.append(row)
    return {"name": group.name, "unit": group.unit, "rows": rows}


def _measure(tool: _Tool, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """One repeat of one measurement, in a process of its own.

    Raises:
        RunError: the process failed; its last line is quoted.
    """
    path, result = work / "request.json", work / "result.json"
    result.unlink(missing_ok=True)
    path.write_text(json.dumps(request | {"measure": tool.measure, "result": str(result)}))
    kind = "megatron" if tool.measure.endswith("_megatron") else "measures"
    done = run_child(f"tools.bench_{kind}", path)
    if done.returncode != 0 or not result.is_file():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunError(f"{tool.measure}: {last[0]}")
    values: dict[str, Any] = json.loads(result.read_bytes())
    return values


def _sum_up(group: _Group, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and extremes of the repeats, and what each of them gave."""
    amount = results[0]["amount"]
    seconds = [result["seconds"] for result in results]
    cpu_seconds = [result["cpu_seconds"] for result in results]
    memory = [r["extra_memory_mib"] for r in results if r["extra_memory_mib"] is not None]
    rates = [amount / value / group.scale for value in seconds]
    return {
        "amount": amount,
        "rate": statistics.median(rates),
        "lowest_rate": min(rates),
        "highest_rate": max(rates),
        "rate_per_cpu_second": amount / statistics.median(cpu_seconds) / group.scale,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_memory_mib": max(memory) if memory and group.shows_memory else None,
    }


def _table(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    corpus, settings = report["corpus"], report["settings"]
    loader = report["groups"][-1]["rows"][0]["rate"] * SEQUENCE_LENGTH / 1e6
    lines = [
        f"corpus: {corpus['text_bytes'] / 1e6:.1f} MB in {corpus['documents']:,} documents of "
        f"{corpus['source']}, {corpus['tokens']:,} tokens of {settings['tokenizer']}",
        f"sample order of {settings['index_tokens'] / 1e6:,.1f} M tokens; blend of "
        f"{settings['blend_samples'] / 1e6:,.1f} M samples; {settings['loader_samples']:,} samples "
        f"of {SEQUENCE_LENGTH:,} tokens loaded",
        f"median of {settings['repeats']} (lowest to highest); memory: what the work adds at its "
        "peak; same: the results are equal",
        "",
    ]
    for group in report["groups"]:
        head = f"{group['name']} ({group['unit']})"
        lines.append(
            f"{head:<42}{'rate':>10}{'lowest':>10}{'highest':>10}{'per cpu-s':>11}{'seconds':>9}"
            f"{'MiB':>8}{'megaphi is':>12}{'same':>6}"
        )
        lines.extend(f"  {_row(row)}".rstrip() for row in group["rows"])
        lines.append("")
    lines.append(
        f"our tokenizing ran on {corpus['backend']} with {settings['workers']} process(es)"
    )
    lines.append(f"our loader gave {loader:,.1f} M tokens/s")
    return lines


def _row(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "problem" in row:
        return f"{row['name']:<40}{row['problem']:>10}"
    rates = (row[key] for key in ("rate", "lowest_rate", "highest_rate"))
    numbers = "".join(f"{_number(rate):>10}" for rate in rates)
    memory = "" if row["extra_memory_mib"] is None else f"{row['extra_memory_mib']:,.0f}"
    ratio = f"{row['megaphi_ratio']:.3g}x" if "megaphi_ratio" in row else ""
    same = {True: "yes", False: "NO", None: ""}[row.get("same_result")]
    return (
        f"{row['name']:<40}{numbers}{_number(row['rate_per_cpu_second']):>11}"
        f"{statistics.median(row['seconds']):>9.3f}{memory:>8}{ratio:>12}{same:>6}"
    )


def _number(value: float) -> str:
    """Three digits or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
