"""Reads from a picture what it shows and compares this with its caption; needs no torch.

python scripts/check_demo_pictures.py picture.png "a red circle on a blue background"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from demo_pictures import (
    COLOURS,
    PICTURE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    caption_of,
    held_out_scenes,
    parse_caption,
    shape_outline,
)
from PIL import Image, ImageDraw

ATTRIBUTES = ("colour", "shape", "position", "background", "size")
_FOREGROUND_DISTANCE = 45.0  # in RGB: far above noise, half the distance of the closest colours
_SMALLEST_SHAPE = 40  # pixels of a 128 pixel picture; less is a speck
_TEMPLATE_SIDE = 32
_WORST_OVERLAP = 0.6  # the two most alike shapes overlap by 0.8, a blot by less than this
_POSITION_TOLERANCE = 13.0  # half the way from the centre to any other position
_SIZE_BOUNDARY = 50.0  # bounding box: 39 to 46 pixels when small, 54 to 68 when large


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it shows nothing that has a name."""

    colour: str | None
    shape: str | None
    position: str | None
    background: str | None
    size: str | None
    overlap: float = 0.0  # of the shape with the perfect one, 0 to 1


@dataclass(frozen=True)
class Score:
    """Shares (0 to 1) of pictures which show what their caption says."""

    colour: float
    shape: float
    position: float
    background: float
    size: float
    all_right: float  # colour, shape, position and background together

    def __str__(self) -> str:
        names = ("all_right", *ATTRIBUTES)
        return "  ".join(f"{name} {100 * getattr(self, name):.1f} %" for name in names)


def held_out_captions() -> list[str]:
    """The 50 captions that the demo model was never trained on."""
    return [caption_of(scene) for scene in held_out_scenes()]


def _nearest_colour(rgb: np.ndarray) -> str:
    distances = {n: float(np.linalg.norm(rgb - np.array(c))) for n, c in COLOURS.items()}
    return min(distances, key=distances.__getitem__)


def _border_colour(picture: np.ndarray) -> np.ndarray:
    width = max(1, len(picture) // 32)
    ring = np.ones(picture.shape[:2], bool)
    ring[width:-width, width:-width] = False
    return np.median(picture[ring], axis=0)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask, so that specks do not stretch the bounding box."""
    open_pixels = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    largest: list[tuple[int, int]] = []
    while open_pixels:
        stack = [open_pixels.pop()]
        component = []
        while stack:
            y, x = stack.pop()
            component.append((y, x))
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in open_pixels:
                    open_pixels.remove(neighbour)
                    stack.append(neighbour)
        largest = max(largest, component, key=len)
    result = np.zeros_like(mask)
    if largest:
        result[tuple(np.array(largest).T)] = True
    return result


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box stretched to the template size: shape without place and size."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = (_TEMPLATE_SIDE, _TEMPLATE_SIDE)
    stretched = Image.fromarray(box.astype(np.uint8) * 255).resize(side, Image.Resampling.BOX)
    return np.asarray(stretched) > 127


@cache
def _template(shape: str) -> np.ndarray:
    canvas = Image.new("L", (PICTURE_SIZE * 4, PICTURE_SIZE * 4))
    half = PICTURE_SIZE * 2
    points = [(half + half * 0.9 * x, half + half * 0.9 * y) for x, y in shape_outline(shape)]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return _normalised(np.asarray(canvas) > 127)


def _read_shape(mask: np.ndarray) -> tuple[str | None, float]:
    """The best fitting shape's name (None if none fits) and its intersection over union."""
    normalised = _normalised(mask)
    overlaps = {
        shape: float((normalised & _template(shape)).sum() / (normalised | _template(shape)).sum())
        for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= _WORST_OVERLAP else None), overlaps[best]


def _read_position(x: float, y: float) -> str | None:
    distances = {n: float(np.hypot(x - u, y - v)) for n, (u, v) in POSITIONS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= _POSITION_TOLERANCE else None


def read_picture(picture: np.ndarray) -> Reading:
    """Read a uint8 picture (height, width, 3) of any size; distances are scaled to 128 pixels."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    side = (PICTURE_SIZE, PICTURE_SIZE)
    if picture.shape[:2] != side:
        picture = np.asarray(Image.fromarray(picture).resize(side, Image.Resampling.BOX))
    pixels = picture.astype(np.float32)
    ground = _border_colour(pixels)
    background = _nearest_colour(ground)
    mask = _largest_component(np.linalg.norm(pixels - ground, axis=2) > _FOREGROUND_DISTANCE)
    if mask.sum() < _SMALLEST_SHAPE:
        return Reading(None, None, None, background, None)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    centre = PICTURE_SIZE / 2
    shape, overlap = _read_shape(mask)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    return Reading(
        colour=_nearest_colour(np.median(pixels[mask], axis=0)),
        shape=shape,
        position=_read_position(
            (columns[0] + columns[-1] + 1) / 2 - centre, (rows[0] + rows[-1] + 1) / 2 - centre
        ),
        background=background,
        size=list(SIZES)[int(extent > _SIZE_BOUNDARY)],
        overlap=overlap,
    )


def judge(caption: str, picture: np.ndarray) -> dict[str, bool]:
    """Per attribute whether the picture shows it; what a caption leaves open is always right."""
    wanted, seen = parse_caption(caption), read_picture(picture)
    return {n: getattr(wanted, n) in (None, getattr(seen, n)) for n in ATTRIBUTES}


def score(captions: Sequence[str], pictures: Sequence[np.ndarray]) -> Score:
    """Shares of right pictures, for as many captions as pictures."""
    if not captions or len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures: need one each")
    verdicts = [judge(c, p) for c, p in zip(captions, pictures, strict=True)]
    shares = {name: float(np.mean([v[name] for v in verdicts])) for name in ATTRIBUTES}
    all_right = np.mean([all(v[name] for name in ATTRIBUTES if name != "size") for v in verdicts])
    return Score(**shares, all_right=float(all_right))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a picture shows; the exit status says whether it shows its caption."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("caption")
    options = parser.parse_args(arguments)
    picture = np.asarray(Image.open(options.picture).convert("RGB"))
    verdict = judge(options.caption, picture)
    print(read_picture(picture))
    print("  ".join(f"{name}: {'right' if ok else 'WRONG'}" for name, ok in verdict.items()))
    return 0 if all(verdict.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
