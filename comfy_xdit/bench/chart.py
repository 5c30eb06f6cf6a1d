"""A bar chart, drawn with pillow."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROW, NAMES, BARS, MARGIN = 24, 300, 400, 16  # pixels
INK, BAR, LINE = (40, 40, 40), (90, 140, 200), (200, 90, 60)


def bars(title: str, values: dict[str, float], file: Path, line: float) -> None:
    """Write horizontal bars by name, with a vertical line at the value `line`."""
    font = ImageFont.load_default(14)
    height = ROW * (len(values) + 1) + 2 * MARGIN
    picture = Image.new("RGB", (NAMES + BARS + 80, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, INK, font)
    scale = BARS / max(line, *values.values())
    for number, (name, value) in enumerate(values.items(), 1):
        top = MARGIN + number * ROW
        draw.text((MARGIN, top), name, INK, font)
        draw.rectangle((NAMES, top, NAMES + scale * value, top + ROW - 8), BAR)
        draw.text((NAMES + scale * value + 6, top), f"{value:.2f}", INK, font)
    x = NAMES + scale * line
    draw.line((x, MARGIN + ROW, x, height - MARGIN), LINE, 1)
    picture.save(file)
