"""The tables of `megaphi bench train`."""

from typing import Any

from tools.bench.train.profile import CATEGORIES


def speed_lines(report: dict[str, Any]) -> list[str]:
    """A line a configuration: rates, MFU, memory, ratios."""
    settings = report["settings"]
    lines = [
        f"{settings['steps']} steps timed by the host's clock after {settings['warmup_steps']}; "
        "ms: median step by the device's;",
        "MFU against the bf16 peak, 6 N + 12 L d s FLOPs a token (causal: attention halved); "
        "x first: over the",
        "first row of the same batch and dropout; x peer: over the fastest peer of the same",
        "",
        f"{'configuration':<34}{'batch':>6}{'drop':>6}{'tok/s':>10}{'ms':>9}{'MFU':>8}{'causal':>8}"
        f"{'GiB':>7}{'loss':>8}{'warm-up s':>11}{'x first':>9}{'x peer':>8}",
    ]
    for row in report["rows"]:
        head = _head(row)
        if "problem" in row:
            lines.append(f"{head}  {row['problem']}")
            continue
        peer = f"{row['over_peer']:.2f}" if "over_peer" in row else ""
        lines.append(
            f"{head}{row['tokens_per_second']:>10,.0f}{row['step_ms']:>9.1f}"
            f"{_share(row['mfu']):>8}{_share(row['mfu_causal']):>8}"
            f"{row['peak_memory_gib']:>7.1f}{row['losses'][-1]:>8.3f}"
            f"{row['warmup_seconds']:>11.1f}{row['over_base']:>9.2f}{peer:>8}".rstrip()
        )
    return lines


def curve_lines(report: dict[str, Any]) -> list[str]:
    """A line a configuration: the loss on the way, and how far the end is from the first row."""
    lines = [
        f"{report['settings']['steps']} steps; end: mean loss of the last tenth of the steps; "
        "difference: from the first row",
        "",
        f"{'configuration':<34}{'batch':>6}{'drop':>6}{'first':>9}{'quarter':>9}{'half':>9}"
        f"{'end':>9}{'difference':>12}{'tok/s':>10}",
    ]
    for row in report["rows"]:
        head = _head(row)
        if "problem" in row:
            lines.append(f"{head}  {row['problem']}")
            continue
        losses = row["losses"]
        shown = [losses[0], losses[len(losses) // 4], losses[len(losses) // 2], row["final_loss"]]
        numbers = "".join(f"{value:>9.4f}" for value in shown)
        rate = f"{row['tokens_per_second']:>10,.0f}"
        lines.append(f"{head}{numbers}{row['loss_difference']:>+12.4f}{rate}")
    return lines


def profile_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time of a step goes, for the rows that were profiled."""
    profiled = [row for row in rows if "profile" in row]
    if not profiled:
        return []
    of = profiled[0]["profile"]["of"]
    columns = "".join(f"{kind:>18}" for kind in CATEGORIES)
    lines = ["", f"{f'ms a step, by {of}':<46}{columns}"]
    for row in profiled:
        values = "".join(f"{row['profile']['ms'][kind]:>18.2f}" for kind in CATEGORIES)
        lines.append(f"{_head(row)}{values}")
    return lines


def _head(row: dict[str, Any]) -> str:
    """Name, batch and dropout of a row."""
    chosen = row["configuration"]
    return f"{row['name']:<34}{chosen['micro_batch']:>6}{chosen['dropout']:>6g}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
