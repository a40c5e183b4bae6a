"""Plots of the report as inline SVG: grouped bars and lines, one colour a corpus."""

from collections.abc import Sequence
from html import escape

COLOURS = ("#1f6feb", "#d9822b")
_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 8, 10, 40


def bars(labels: Sequence[str], series: Sequence[Sequence[float]]) -> str:
    """Grouped bars.

    Args:
        labels: [n] under the groups.
        series: of each corpus, [n] heights.
    """
    top = max((max(values, default=0) for values in series), default=0) or 1
    group = (_WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    width = 0.8 * group / max(len(series), 1)
    marks = []
    for place, label in enumerate(labels):
        left = _LEFT + place * group + 0.1 * group
        for number, values in enumerate(series):
            height = (_HEIGHT - _TOP - _BOTTOM) * values[place] / top
            marks.append(
                f'<rect x="{left + number * width:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[number]}"><title>{escape(label)}: {values[place]:g}</title></rect>'
            )
        stride = -(-len(labels) // 14)
        if place % stride == 0:
            middle = left + 0.4 * group
            marks.append(
                f'<text x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
                f"{escape(label)}</text>"
            )
    return _frame(marks, top)


def lines(series: Sequence[Sequence[tuple[float, float]]], top: float, axis: str) -> str:
    """Lines through points.

    Args:
        series: of each corpus, (x, y) by ascending x.
        top: of the y axis.
        axis: what x counts.
    """
    right = max((points[-1][0] for points in series if points), default=1) or 1
    marks = []
    for number, points in enumerate(series):
        places = [
            (
                _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / right,
                _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y / top,
            )
            for x, y in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = COLOURS[number]
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (count, value) in zip(places, points, strict=True):
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{count:g}: {value:g}</title></circle>"
            )
    marks.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="end">'
        f"{right:,.0f} {escape(axis)}</text>"
    )
    return _frame(marks, top)


def _frame(marks: Sequence[str], top: float) -> str:
    """The drawing with its axes; y goes from 0 to `top`."""
    base = _HEIGHT - _BOTTOM
    axes = (
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{top:,g}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{axes}{"".join(marks)}</svg>'
