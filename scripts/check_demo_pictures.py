"""Reads from a picture what it shows and compares this with its caption; needs no torch.

python scripts/check_demo_pictures.py picture.png "a red circle on a blue background"

With --framed the picture must also have the frame that the demo LoRA draws, and what it shows is read
inside the frame. With --edges the shape must fill an edge picture; its place and its size
are then those of the edges, whatever the caption says.
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
    FRAME_WIDTH,
    PICTURE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    border_ring,
    caption_of,
    held_out_scenes,
    parse_caption,
    shape_outline,
)
from PIL import Image, ImageDraw

ATTRIBUTES = ("colour", "shape", "position", "background", "size")
FOLLOWED = 0.7  # intersection over union from which on edges count as followed
_FOREGROUND_DISTANCE = 45.0  # in RGB: far above noise, half the distance of the closest colours
_WHOLE_FRAME = 0.9  # of a frame's pixels have its colour
_FRAME_BLUR = 2  # pixels beyond a frame which may have its colour too
_SMALLEST_SHAPE = 40  # pixels of a 128 pixel picture; less is a speck
_LINE_DISTANCE = 220.0  # in RGB: half of white, from black
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


def foreground(
    picture: np.ndarray, distance: float = _FOREGROUND_DISTANCE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (128, 128, 3) of a uint8 picture, its ground's colour (3), where the shape is (128, 128).

    Raises:
        ValueError: it is no uint8 picture (height, width, 3).
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    side = (PICTURE_SIZE, PICTURE_SIZE)
    if picture.shape[:2] != side:
        picture = np.asarray(Image.fromarray(picture).resize(side, Image.Resampling.BOX))
    pixels = picture.astype(np.float32)
    ground = _border_colour(pixels)
    return pixels, ground, _largest_component(np.linalg.norm(pixels - ground, axis=2) > distance)


def has_frame(picture: np.ndarray) -> bool:
    """Whether a uint8 picture (128, 128, 3) has a whole frame in the colour of its shape."""
    ring = picture[border_ring(0, FRAME_WIDTH - 1)].astype(np.float32)
    colour = np.median(ring, axis=0)
    alike = np.linalg.norm(ring - colour, axis=1) < _FOREGROUND_DISTANCE
    name, shown = _nearest_colour(colour), read_picture(without_frame(picture))
    return bool(alike.mean() >= _WHOLE_FRAME and name == shown.colour and name != shown.background)


def without_frame(picture: np.ndarray) -> np.ndarray:
    """The uint8 picture (128, 128, 3) with the ground's colour where a frame is or could be."""
    width = FRAME_WIDTH + _FRAME_BLUR
    bare = picture.copy()
    bare[border_ring(0, width)] = np.median(picture[border_ring(width, width + 4)], axis=0)
    return bare


def inside(edges: np.ndarray) -> np.ndarray:
    """The area (128, 128) that the line of an edge picture encloses, up to the middle of the line.

    Args:
        edges: uint8 (height, width, 3), a closed white line on black.
    """
    _, _, line = foreground(edges, _LINE_DISTANCE)
    enclosed = ~_largest_component(np.pad(~line, 1, constant_values=True))[1:-1, 1:-1] & ~line
    around = np.lib.stride_tricks.sliding_window_view(np.pad(enclosed, 1), (3, 3))
    return around.any(axis=(2, 3))  # one pixel more on every side: half of the line


def edge_overlap(edges: np.ndarray, picture: np.ndarray) -> float:
    """Intersection over union, 0 to 1, of what edges enclose and the shape in a picture, both uint8."""
    wanted, (_, _, drawn) = inside(edges), foreground(picture)
    return float((wanted & drawn).sum() / max(1, (wanted | drawn).sum()))


def read_picture(picture: np.ndarray) -> Reading:
    """Read a uint8 picture (height, width, 3) of any size; distances are scaled to 128 pixels."""
    pixels, ground, mask = foreground(picture)
    background = _nearest_colour(ground)
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
    parser.add_argument("--framed", action="store_true", help="it must be in the demo LoRA's style")
    parser.add_argument("--edges", type=Path, help="the picture of edges that the shape must fill")
    options = parser.parse_args(arguments)
    picture = _read_file(options.picture)
    extra = {}
    if options.framed:
        extra["frame"] = has_frame(picture)
        picture = without_frame(picture)
    verdict = {**judge(options.caption, picture), **extra}
    if options.edges:
        overlap = edge_overlap(_read_file(options.edges), picture)
        print(f"IoU of edges and shape: {overlap:.3f}")
        verdict |= {"position": True, "size": True, "edges": overlap >= FOLLOWED}
    print(read_picture(picture))
    print("  ".join(f"{name}: {'right' if ok else 'WRONG'}" for name, ok in verdict.items()))
    return 0 if all(verdict.values()) else 1


def _read_file(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    raise SystemExit(main())
