"""Draws the icon and the banner that ComfyUI's registry shows: assets/registry/icon.png and banner.png.

`python scripts/draw_registry_pictures.py`; needs Pillow. One node becomes four that share a picture.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "registry"
GROUND, NODE, WIRE = (24, 26, 32), (46, 50, 60), (120, 128, 145)
PARTS = ((233, 96, 80), (240, 180, 70), (88, 180, 140), (90, 140, 220))
ICON, BANNER = (400, 400), (1260, 540)  # the registry's sizes: at most 400 x 400, and 21:9
FINE = 4  # drawn so much larger, then made small: smooth edges


def emblem(draw: ImageDraw.ImageDraw, left: float, top: float, side: float) -> None:
    """A node at the left, wires to four parts of one picture at the right."""
    unit = side / 20
    draw.rounded_rectangle(
        _box(left + unit, top + 7 * unit, 5.5 * unit, 6 * unit), unit, NODE, WIRE, int(unit / 4)
    )
    for number, colour in enumerate(PARTS):
        middle = top + (4 + 4 * number) * unit
        wire = [(left + 6.5 * unit, top + 10 * unit), (left + 9 * unit, middle), (left + 11 * unit, middle)]
        draw.line(wire, colour, int(0.55 * unit), joint="curve")
        draw.rectangle(_box(left + 11 * unit, middle - 1.85 * unit, 8 * unit, 3.7 * unit), colour)
    socket = _box(left + 5.9 * unit, top + 9.4 * unit, 1.2 * unit, 1.2 * unit)
    draw.ellipse(socket, WIRE)


def _box(left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    return left, top, left + width, top + height


def icon() -> Image.Image:
    """The emblem alone."""
    picture, draw = _sheet(ICON)
    emblem(draw, 0, 0, picture.width)
    return picture.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The emblem, the name and what it does."""
    picture, draw = _sheet(BANNER)
    emblem(draw, 60 * FINE, 90 * FINE, 360 * FINE)
    for text, size, top, colour in (
        ("comfy_xdit", 96, 150, "white"),
        ("one loader node, all your GPUs", 44, 280, WIRE),
        ("stock MODEL, CLIP and VAE", 44, 340, WIRE),
    ):
        draw.text((480 * FINE, top * FINE), text, colour, ImageFont.load_default(size * FINE))
    return picture.resize(BANNER, Image.Resampling.LANCZOS)


def _sheet(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (size[0] * FINE, size[1] * FINE), GROUND)
    return picture, ImageDraw.Draw(picture)


def main() -> None:
    """Write both."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in (("icon", icon()), ("banner", banner())):
        picture.quantize(64).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
