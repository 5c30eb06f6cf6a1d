"""Lines over a number, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 190, 40, 48  # pixels
COLOURS = ("#3a6ea5", "#c8553d", "#4f8a4c", "#8a6bb1", "#b08a2e")
Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]


def lines(title: str, across: str, up: str, series: Mapping[str, Points], log_x: bool = False) -> str:
    """An SVG of one line per series; the vertical scale is logarithmic.

    Raises:
        ValueError: no point, or one that a logarithm cannot show.
    """
    points = [point for line in series.values() for point in line]
    if not points or min(y for _, y in points) <= 0 or (log_x and min(x for x, _ in points) <= 0):
        raise ValueError(f"{title}: a line over a logarithmic scale needs numbers above 0")
    x_of = _scale([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
    y_of = _scale([y for _, y in points], HEIGHT - BOTTOM, TOP, True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#282828">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">{across}</text>',
        f'<text x="{LEFT}" y="{TOP - 6}">{up}</text>',
        *_grid(points, x_of, y_of),
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        y = TOP + 18 * number + 12
        parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{y}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: Sequence[float], begin: float, end: float, log: bool) -> Scale:
    of = math.log10 if log else float
    low, high = of(min(values)), of(max(values))
    span = (high - low) or 1.0
    return lambda value: begin + (end - begin) * (of(value) - low) / span


def _grid(points: Points, x_of: Scale, y_of: Scale) -> list[str]:
    """The numbers of the points themselves across, powers of ten and their halves up."""
    right, parts = WIDTH - RIGHT, []
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{x:.3g}</text>')
    low, high = (f(y for _, y in points) for f in (min, max))
    ticks = [k * 10.0**e for e in range(-4, 7) for k in (1, 2, 5)]
    for y in (tick for tick in ticks if low <= tick <= high):
        at = f"{y_of(y):.1f}"
        parts.append(f'<line x1="{LEFT}" y1="{at}" x2="{right}" y2="{at}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" text-anchor="end">{y:.5g}</text>')
    return parts
