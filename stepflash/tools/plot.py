"""Line plots on logarithmic axes without a plotting library: as text for terminals, as SVG for documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[float | None]]  # None leaves a gap
MARKERS = "SDKGMXABCEFHIJLNOPQRTUVWYZ"
COLOURS = ("#d6336c", "#1971c2", "#2f9e44", "#e8590c", "#6741d9", "#0c8599", "#868e96", "#f08c00")


def _bounds(series: Series) -> tuple[float, float]:
    values = [value for line in series.values() for value in line if value is not None] or [1.0]
    low, high = math.log10(min(values)), math.log10(max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def text_plot(labels: Sequence[str], series: Series, height: int = 14, column: int = 8) -> str:
    """One column for each label, one letter for each line, logarithmic upwards; `*` where letters meet.

    Every series has as many values as there are labels, all positive.
    """
    low, high = _bounds(series)
    grid = [[" "] * (column * len(labels)) for _ in range(height)]
    for marker, line in zip(MARKERS, series.values(), strict=False):
        for index, value in enumerate(line):
            if value is None:
                continue
            row = height - 1 - round((math.log10(value) - low) / (high - low) * (height - 1))
            at = index * column + column // 2
            grid[row][at] = marker if grid[row][at] == " " else "*"
    lines = []
    for index, row_cells in enumerate(grid):
        value = 10 ** (high - (high - low) * index / (height - 1))
        mark = f"{value:8.3g}" if index % 3 == 0 or index == height - 1 else " " * 8
        lines.append(f"{mark} |{''.join(row_cells)}".rstrip())
    lines.append(" " * 8 + " +" + "-" * (column * len(labels)))
    lines.append(" " * 10 + "".join(f"{label:^{column}}" for label in labels).rstrip())
    names = [f"{marker} {name}" for marker, name in zip(MARKERS, series, strict=False)]
    return "\n".join([*lines, " " * 10 + ", ".join(names)])


def svg_plot(title: str, labels: Sequence[str], series: Series, width: int = 720, height: int = 420) -> str:
    """The same as an SVG document: evenly spaced labels, logarithmic upwards, a legend at the right."""
    low, high = _bounds(series)
    left, right, top, bottom = 60, width - 170, 40, height - 40
    step = (right - left) / max(1, len(labels) - 1)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index, label in enumerate(labels):
        x = left + index * step
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>'
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#eee"/>'
        )
    ticks = [
        10.0**power * digit for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)
    ]
    for value in ticks:
        if low - 1e-9 <= math.log10(value) <= high + 1e-9:
            parts.append(
                f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
                f'<line x1="{left}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}" stroke="#ddd"/>'
            )
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(left + i * step, y(value)) for i, value in enumerate(line) if value is not None]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points)
        parts.append(
            f'<text x="{right + 14}" y="{top + 18 * number + 10}" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
