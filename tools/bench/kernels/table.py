"""The table of `megaphi bench kernels`, and its verdict on each of our kernels."""

from collections.abc import Iterator
from typing import Any

OURS = ("eager", "compile", "triton")
"""The plain definition, compiled and not, and our kernel; others are libraries' and variants."""
MUST_BE_RIGHT = ("eager", "triton")
"""Implementations whose failure is ours."""


def decisive_ms(row: dict[str, Any]) -> float | None:
    """The time that counts: of all passes, on the device where it was measured apart."""
    if "passes" not in row:
        return None
    entry = row["passes"].get("both") or row["passes"]["forward"]
    return float(entry["device_ms"] or entry["ms"])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether our Triton kernel earns its place: it beats torch.compile, or saves memory."""
    by_name = {row["provider"]: row for row in rows}
    triton, compiled = by_name.get("triton", {}), by_name.get("compile", {})
    ours = decisive_ms(triton)
    if ours is None:
        return f"triton not measured: {triton.get('problem', 'not asked for')}"
    others = {n: t for n, r in by_name.items() if n not in OURS if (t := decisive_ms(r))}
    rivals = {n: t for n, t in others.items() if not n.startswith("triton,")}
    parts = []
    theirs = decisive_ms(compiled)
    if theirs is None:
        parts.append(f"compile not measured: {compiled.get('problem', 'not asked for')}")
    else:
        parts.append(
            f"{'FASTER' if ours < theirs else 'SLOWER'} than compile: {theirs / ours:.2f}x"
        )
        memory, compiled_memory = triton["peak_mib"], compiled["peak_mib"]
        if memory is not None and compiled_memory is not None:
            parts.append(f"peak {memory:,.0f} MiB against {compiled_memory:,.0f}")
    parts += [f"{theirs / ours:.2f}x {name}" for name, theirs in rivals.items()]
    variants = {n: t for n, t in others.items() if n.startswith("triton,")}
    if variants:
        best = min(variants, key=lambda name: variants[name])
        parts.append(f"best variant {best.removeprefix('triton, ')}: {ours / variants[best]:.2f}x")
    return "; ".join(parts)


def table(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    settings, ceilings = report["settings"], report["ceilings"]
    lines = [
        f"{settings['shapes']} shapes, {settings['rows']:,} tokens, {settings['dtype']}; AdamW on "
        f"{settings['optimizer_parameters'] / 1e6:,.1f} M parameters; on {settings['device']}",
        f"measured ceilings: copy {ceilings['copy_gbps']:,.0f} GB/s (read + written), matrix "
        f"product {ceilings['matmul_tflops']:,.1f} TFLOP/s",
        "ms: median (20th to 80th percentile) of a call; device: without launches; GB/s: fewest "
        "bytes over time;",
        "share: of the time that a ceiling allows; error: against fp32; fwd+bwd: both passes of a "
        "training",
        "",
    ]
    for group in report["groups"]:
        head = f"{group['name']} ({group['dtype']})"
        lines.append(
            f"{head:<34}{'pass':>8}{'ms':>10}{'p20':>9}{'p80':>9}{'device':>9}{'GB/s':>8}"
            f"{'TFLOP/s':>9}{'share':>7}{'MiB':>8}{'error':>9}"
        )
        for row in group["rows"]:
            lines.extend(_rows_of(row))
        lines += [f"  -> {group['verdict']}", ""]
    if report["without_case"]:
        lines.append(f"not measured, no case: {', '.join(report['without_case'])}")
    lines += [f"FAILED {failure}" for failure in report["failed"]]
    return lines


def _rows_of(row: dict[str, Any]) -> Iterator[str]:
    """The lines of one implementation."""
    if "problem" in row:
        yield f"  {row['provider']:<32}{row['problem']}"
        return
    for name, entry in row["passes"].items():
        shown = {"forward": "fwd", "both": "fwd+bwd"}[name]
        device = "" if entry["device_ms"] is None else f"{entry['device_ms']:.4f}"
        tflops = f"{entry['tflops']:,.1f}" if "tflops" in entry else ""
        last = name == list(row["passes"])[-1]
        memory = f"{row['peak_mib']:,.0f}" if last and row["peak_mib"] is not None else ""
        error = f"{row['error']:.1e}" if last else ""
        yield (
            f"  {row['provider']:<32}{shown:>8}{entry['ms']:>10.4f}{entry['p20']:>9.4f}"
            f"{entry['p80']:>9.4f}{device:>9}{entry['gbps']:>8,.0f}{tflops:>9}"
            f"{entry['share']:>7.0%}{memory:>8}{error:>9}"
        )
