"""`megaphi bench data`: deduplication, decontamination, tokenizing, sample order, loading.

Every repeat of every measurement is a process of its own, and megaphi and its peers take turns, so
that whatever else the machine is doing hits them alike. Where a peer does the same work, the
results are compared as well: a figure for another result would mean nothing.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaphi.errors import RunError
from tools.bench.data.measures import BLEND_WEIGHTS, MICRO_BATCH_SIZE, SEQUENCE_LENGTH
from tools.bench.data.rows import GROUPS, MEGATRON_LM, Group, Tool
from tools.bench.machine import package_version, run_child


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
            "megatron_lm": str(options.megatron_lm or ""),
        }
        groups = [_run_group(group, request, work, options) for group in _chosen(options)]
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
    from data_pipeline.ingest.stage import IngestOptions, plan_ingest
    from data_pipeline.runner.stage import Options, run_stage
    from data_pipeline.tokens.tokenizer import load_tokenizer

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


def _chosen(options: argparse.Namespace) -> list[Group]:
    """The groups that were asked for; `tokenize` is always one, the others read its token file.

    Raises:
        ValueError: there is no such group.
    """
    if options.groups is None:
        return list(GROUPS)
    names = options.groups.split(",")
    known = [group.name for group in GROUPS]
    for name in names:
        if name not in known:
            raise ValueError(f"--groups {name}: there are {', '.join(map(repr, known))}")
    return [group for group in GROUPS if group.name in (*names, "tokenize")]


def _version(tool: Tool, options: argparse.Namespace) -> str | None:
    """Version of what a row needs: of a distribution, or the commit of a checkout."""
    if tool.package != MEGATRON_LM:
        return tool.package and package_version(tool.package)
    if options.megatron_lm is None:
        return None
    command = ["git", "-C", str(options.megatron_lm), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _run_group(
    group: Group, request: dict[str, Any], work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the rows of a group in turns and set them against ours."""
    repeats = options.repeats
    versions = {tool: _version(tool, options) for tool in group.tools}
    results: dict[Tool, list[dict[str, Any]]] = {tool: [] for tool in group.tools}
    problems: dict[Tool, str] = {}
    for repeat in range(repeats):
        for tool in group.tools:
            if tool in problems:
                continue
            if tool.package is not None and versions[tool] is None:
                given = tool.package != MEGATRON_LM
                problems[tool] = "not installed" if given else "--megatron-lm is not given"
                continue
            print(f"{repeat + 1}/{repeats} {tool.label}", file=sys.stderr, flush=True)
            try:
                results[tool].append(_measure(tool, request, work))
            except RunError as error:
                if tool.ours:
                    raise
                problems[tool] = f"failed: {error}"
    ours = group.tools[0]
    own = None if ours in problems else _sum_up(group, results[ours])
    rows = []
    for tool in group.tools:
        row: dict[str, Any] = {"name": tool.label, "package": tool.package}
        row["version"] = versions[tool]
        if tool in problems:
            row["problem"] = problems[tool]
        else:
            row |= _sum_up(group, results[tool])
        if not tool.ours and own is not None and tool not in problems:
            digests = [results[which][0]["digest"] for which in (ours, tool)]
            row["megaphi_ratio"] = own["rate"] / row["rate"]
            row["megaphi_cpu_ratio"] = own["rate_per_cpu_second"] / row["rate_per_cpu_second"]
            row["same_result"] = digests[0] == digests[1] if all(digests) else None
        rows.append(row)
    return {"name": group.name, "unit": group.unit, "rows": rows}


def _measure(tool: Tool, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """One repeat of one measurement, in a process of its own.

    Raises:
        RunError: the process failed; its last line is quoted.
    """
    path, result = work / "request.json", work / "result.json"
    result.unlink(missing_ok=True)
    path.write_text(json.dumps(request | {"measure": tool.measure, "result": str(result)}))
    done = run_child(tool.module, path)
    if done.returncode != 0 or not result.is_file():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunError(f"{tool.measure}: {last[0]}")
    sys.stderr.write(done.stderr)  # warnings
    values: dict[str, Any] = json.loads(result.read_bytes())
    return values


def _sum_up(group: Group, results: list[dict[str, Any]]) -> dict[str, Any]:
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
            f"{'MiB':>8}{'megaphi is':>12}{'by cpu':>9}{'same':>6}"
        )
        lines.extend(f"  {_row(row)}".rstrip() for row in group["rows"])
        lines.append("")
    lines.append(
        f"our tokenizing ran on {corpus['backend']} with {settings['workers']} process(es)"
    )
    for group in report["groups"]:
        if group["name"] == "loader":
            rate = group["rows"][0]["rate"] * SEQUENCE_LENGTH / 1e6
            lines.append(f"our loader gave {rate:,.1f} M tokens/s")
    return lines


def _row(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "problem" in row:
        return f"{row['name']:<40}{row['problem']:>10}"
    rates = (row[key] for key in ("rate", "lowest_rate", "highest_rate"))
    numbers = "".join(f"{_number(rate):>10}" for rate in rates)
    memory = "" if row["extra_memory_mib"] is None else f"{row['extra_memory_mib']:,.0f}"
    ratio, by_cpu = (
        f"{row[key]:.3g}x" if key in row else "" for key in ("megaphi_ratio", "megaphi_cpu_ratio")
    )
    same = {True: "yes", False: "NO", None: ""}[row.get("same_result")]
    return (
        f"{row['name']:<40}{numbers}{_number(row['rate_per_cpu_second']):>11}"
        f"{statistics.median(row['seconds']):>9.3f}{memory:>8}{ratio:>12}{by_cpu:>9}{same:>6}"
    )


def _number(value: float) -> str:
    """Three digits or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
