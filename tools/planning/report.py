"""The report of `megaphi plan` as text for people."""

import math
from typing import Any


def render(report: dict[str, Any]) -> str:
    """Everything of a plan as lines of text."""
    recipe = report["recipe"]
    kernels = "Triton kernels" if report["kernels"] == "triton" else "plain PyTorch operations"
    lines = [
        f"{recipe['parameters']:,} parameters, {recipe['tokens_per_step']:,} tokens a step, "
        f"{recipe['steps']:,} steps, {recipe['tokens'] / 1e9:.1f} B tokens",
        f"{report['gpus']} x {report['gpu']} ({report['gpu_memory_gib']:.1f} GiB), "
        f"{report['gpus_per_node']} a node, {recipe['precision']}, {kernels} "
        f"(MEGAPHI_KERNELS={report['kernels']})",
        "",
        f"the recipe's layout: {layout_text(report['own'])}",
    ]
    if not report["own"]["problems"]:
        lines += _details(report["own"], report["gpu_memory_gib"])
    lines += ["", "fastest layouts that fit, one for each mesh"]
    lines += _table([_summary(row) for row in report["best"]]) if report["best"] else ["  none"]
    lines += ["", *_measured(report)]
    lines += [f"warning: {text}" for text in report["warnings"]]
    if "assumptions" in report:
        lines += ["", "assumptions"]
        lines += _table(
            [{k: row[k] for k in ("name", "value", "source")} for row in report["assumptions"]],
            left=True,
        )
    else:
        lines.append("every figure is a prediction; --assumptions prints what it rests on")
    return "\n".join(lines)


def layout_text(row: dict[str, Any]) -> str:
    """A layout in words."""
    layout = row["layout"]
    parts = [f"{name} {layout[name]}" for name in ("pipeline", "data", "context", "tensor")]
    parts.append(f"micro-batch {layout['micro_batch_size']}")
    if "micro_batches" in row:
        parts.append(f"{row['micro_batches']} a step")
    parts.append("weights freed" if layout["reshard_after_forward"] else "weights kept")
    parts.append(f"recompute {layout['recompute']}")
    if layout["pipeline"] > 1:
        parts.append(_schedule(layout))
    return ", ".join(parts)


def _schedule(layout: dict[str, Any]) -> str:
    """The pipeline schedule, with its chunks where there are several."""
    chunks = f" x{layout['chunks']}" if layout["chunks"] > 1 else ""
    return f"{layout['schedule']}{chunks}"


def _range(low: float, high: float) -> str:
    """Two numbers as a range, to three digits or whole."""
    return f"{_three_digits(low)} to {_three_digits(high)}"


def _three_digits(value: float) -> str:
    """A positive number to three digits, whole where it has more, with four decimals at most."""
    digits = min(4, max(0, 2 - math.floor(math.log10(value))))
    return f"{value:,.{digits}f}"


def _details(own: dict[str, Any], limit: float) -> list[str]:
    """Memory and time by kind, side by side, and what follows from them."""
    memory = [(name, f"{size:.2f}") for name, size in own["memory_kinds_gib"].items()]
    backward = sum(own["memory_kinds_gib"].values())
    memory.append(("sum (backward pass)", f"{backward:.2f}"))
    memory.append(("or in the update", f"{own['update_gib']:.2f}"))
    verdict = "fits" if own["fits"] else "DOES NOT FIT"
    memory.append((f"of {limit:.1f} GiB: {verdict}", f"{own['memory_gib']:.2f}"))
    time = [(name, f"{1000 * s:.1f}") for name, s in own["step_kinds_seconds"].items()]
    time.append(("step", f"{1000 * own['step_seconds']:.1f}"))
    time += [("", "")] * (len(memory) - len(time))
    lines = [f"  {'memory, fullest GPU':<26}{'GiB':>8}    {'time':<16}{'ms a step':>10}"]
    for (left, size), (right, milliseconds) in zip(memory, time, strict=True):
        lines.append(f"  {left:<26}{size:>8}    {right:<16}{milliseconds:>10}".rstrip())
    rates = own["tokens_per_second_per_gpu_calibrated"], own["tokens_per_second_per_gpu"]
    lines.append(
        f"  {_range(*rates)} tokens/s/GPU, {100 * own['mfu_calibrated']:.0f} to "
        f"{100 * own['mfu']:.0f}% MFU, "
        f"{_range(own['days'], own['days_calibrated'])} days, "
        f"{_range(own['gpu_hours'], own['gpu_hours_calibrated'])} GPU-hours"
    )
    lines.append(
        f"  (slower end: x {own['calibration']:.2f}, what a published run of this size reached of "
        "its prediction)"
    )
    return lines


def _summary(row: dict[str, Any]) -> dict[str, str]:
    """A layout as a line of the table."""
    layout = row["layout"]
    return {
        "pp": str(layout["pipeline"]),
        "dp": str(layout["data"]),
        "cp": str(layout["context"]),
        "tp": str(layout["tensor"]),
        "micro": str(layout["micro_batch_size"]),
        "recompute": str(layout["recompute"]),
        "weights": "freed" if layout["reshard_after_forward"] else "kept",
        "schedule": _schedule(layout) if layout["pipeline"] > 1 else "-",
        "GiB": f"{row['memory_gib']:.1f}",
        "step s": _three_digits(row["step_seconds"]),
        "tok/s/GPU": f"{row['tokens_per_second_per_gpu']:,.0f}",
        "MFU": f"{100 * row['mfu']:.1f}%",
        "days": _range(row["days"], row["days_calibrated"]),
        "GPU-hours": _range(row["gpu_hours"], row["gpu_hours_calibrated"]),
        "runs today": "yes" if row["runs_today"] else "not built yet",
    }


def _table(rows: list[dict[str, str]], left: bool = False) -> list[str]:
    """Rows of equal keys as aligned lines, the keys on top unless the text is to the left."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    align = "<" if left else ">"
    shown = rows if left else [{key: key for key in rows[0]}, *rows]
    return [
        "  " + "  ".join(f"{row[key]:{align}{widths[key]}}" for key in widths).rstrip()
        for row in shown
    ]


def _measured(report: dict[str, Any]) -> list[str]:
    """How predictions compare with measurements on this GPU."""
    if not report["measured"]:
        return [f"{report['gpu']}: not measured yet, no training figures in docs/benchmarks"]
    lines = []
    for row in report["measured"]:
        error = row["predicted"] / row["tokens_per_second"] - 1
        lines.append(
            f"measured ({row['file']}, {row['name']}): {row['tokens_per_second']:,.0f} tokens/s, "
            f"predicted {row['predicted']:,.0f} ({error:+.0%}); {row['peak_memory_gib']:.1f} GiB, "
            f"predicted {row['predicted_memory_gib']:.1f}"
        )
    return lines
