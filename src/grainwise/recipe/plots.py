"""Small plots as inline SVG, so that a report is one file that opens anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 70, 48, 24, 24
INK, ACCENT, GRID = "#1f2937", "#0f766e", "#e5e7eb"


def human(value: float, unit: str = "") -> str:
    """A figure for people: bytes in powers of 1000, others to four digits."""
    if unit == "bytes":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.0f} B"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values that span [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def path_plot(
    points: Sequence[tuple[str, float, float]], x_title: str, y_title: str, x_unit: str = "", y_unit: str = ""
) -> str:
    """A path through labelled points (name, x, y): how two figures moved from step to step.

    Points at the same place share one label.
    """
    merged: dict[tuple[float, float], list[str]] = {}
    for name, x, y in points:
        merged.setdefault((x, y), []).append(name)
    x_of = _scale([p[1] for p in points], LEFT, WIDTH - RIGHT)
    y_of = _scale([p[2] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [*_axis(x_of, y_of, x_title, y_title, x_unit, y_unit)]
    line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for _, x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{ACCENT}" stroke-width="1.5" stroke-dasharray="4 3"/>')
    taken: list[float] = []
    for (x, y), names in merged.items():
        px, py = x_of(x), y_of(y)
        row = py - 8
        while any(abs(row - t) < 13 for t in taken):
            row += 13
        taken.append(row)
        anchor, shift = ("end", -8) if px > WIDTH * 0.6 else ("start", 8)
        label = html.escape(", ".join(names))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{ACCENT}"/>')
        parts.append(_text(px + shift, row, label, 11, anchor))
    return _svg(parts)


def bar_plot(bars: Sequence[tuple[str, float]], title: str, unit: str = "") -> str:
    """Horizontal bars from zero, one per step, with their values."""
    height = 30 + 26 * len(bars)
    most = max((v for _, v in bars), default=1.0) or 1.0
    parts = [_text(0, 14, html.escape(title), 12)]
    for i, (name, value) in enumerate(bars):
        y = 24 + 26 * i
        length = (WIDTH - 250) * value / most
        parts.append(_text(0, y + 14, html.escape(name), 11))
        parts.append(f'<rect x="150" y="{y + 2}" width="{max(length, 1):.1f}" height="16" rx="2" fill="{ACCENT}"/>')
        parts.append(_text(158 + length, y + 14, html.escape(human(value, unit)), 11))
    return _svg(parts, height)


class _scale:
    """A linear scale from data to pixels, with room at both ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.stop = low - margin, high + margin, start, stop

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def _axis(x_of: _scale, y_of: _scale, x_title: str, y_title: str, x_unit: str, y_unit: str) -> list[str]:
    floor, parts = HEIGHT - BOTTOM, []
    for value in ticks(x_of.low, x_of.high):
        x = x_of(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{floor}" stroke="{GRID}"/>')
        parts.append(_text(x, floor + 16, human(value, x_unit), 10, "middle"))
    for value in ticks(y_of.low, y_of.high):
        y = y_of(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, y + 3, human(value, y_unit), 10, "end"))
    middle = (TOP + floor) / 2
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x_title, 12, "middle"))
    parts.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, y_title, 12, "middle")}</g>')
    return parts


def _text(x: float, y: float, content: str, size: int, anchor: str = "start") -> str:
    """A label; `content` is escaped already."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">{content}</text>'


def _svg(parts: Sequence[str], height: int = HEIGHT) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif">\n{body}\n</svg>'
    )
