"""The demo model's world: every caption it can be asked for, and how each is drawn.

A scene is one flat shape on a flat ground, so that a program can tell whether a
picture shows what its caption says (see check_demo_pictures.py).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 40, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Radius in pixels of a 128 pixel picture. The autoencoder's cells are 8 pixels wide:
# much smaller shapes lose their corners in it, and a square is then read as a circle.
SIZES = {"small": 21.5, "large": 32.0}
# Offset of the shape's centre from the picture's centre, in pixels of a 128 pixel picture.
POSITIONS: dict[str, tuple[int, int]] = {
    "on the left": (-26, 0),
    "on the right": (26, 0),
    "at the top": (0, -26),
    "at the bottom": (0, 26),
    "in the centre": (0, 0),
}
HELD_OUT_COUNT = 50
HELD_OUT_SEED = 1234
# Pixels: the frame that the demo LoRA draws, one cell of the autoencoder's. The autoencoder
# knows no colours but the palette's, so that a style cannot be one of other colours.
FRAME_WIDTH = 8
EDGE_WIDTH = 7 / 3  # pixels: the line of an edge picture
_SUPERSAMPLING = 3

_CAPTION = re.compile(
    rf"^an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)})(?: (?P<position>{'|'.join(POSITIONS)}))?"
    rf"(?: on an? (?P<background>{'|'.join(COLOURS)}) background)?$"
)


@dataclass(frozen=True)
class Scene:
    """What a caption says; None where it leaves the choice to the painter."""

    colour: str
    shape: str
    position: str | None = None
    background: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a shape is and how large, in pixels of a 128 pixel picture: its centre and its radius."""

    x: float
    y: float
    radius: float


def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase.startswith('orange') else 'a'} {noun_phrase}"


def caption_of(scene: Scene) -> str:
    """The caption of a scene, with the parts left out that the scene leaves open."""
    words = f"{scene.size} " if scene.size else ""
    caption = _with_article(f"{words}{scene.colour} {scene.shape}")
    if scene.position:
        caption += f" {scene.position}"
    if scene.background:
        caption += f" on {_with_article(scene.background)} background"
    return caption


def parse_caption(caption: str) -> Scene:
    """The scene of a caption; ValueError for words that caption_of would not write."""
    match = _CAPTION.match(caption.strip().lower().replace(",", ""))
    if match is None:
        raise ValueError(
            f"cannot read the caption {caption!r}: expected the form "
            "'a small red circle on the left on a blue background'"
        )
    return Scene(**match.groupdict())


def all_scenes() -> list[Scene]:
    """Every fully described scene (2240), in a fixed order."""
    return [
        Scene(colour, shape, position, background, size)
        for size, colour, shape, position, background in itertools.product(
            SIZES, COLOURS, SHAPES, POSITIONS, COLOURS
        )
        if colour != background
    ]


def held_out_scenes() -> list[Scene]:
    """The scenes never trained on: each word is known from training, the combination is not."""
    return random.Random(HELD_OUT_SEED).sample(all_scenes(), HELD_OUT_COUNT)


def training_scenes() -> list[Scene]:
    """All scenes but the held-out ones."""
    held_out = set(held_out_scenes())
    return [scene for scene in all_scenes() if scene not in held_out]


def shape_outline(shape: str) -> list[tuple[float, float]]:
    """The polygon of a shape in units of its radius, around its bounding box's centre."""
    if shape == "circle":
        angles = [2 * math.pi * i / 64 for i in range(64)]
        return [(math.cos(angle), math.sin(angle)) for angle in angles]
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -0.92), (1.0, 0.92), (-1.0, 0.92)]
    arm = 0.34
    corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    return corners + [(-x, -y) for x, y in corners]


def default_parts(colour: str) -> dict[str, str]:
    """What is drawn where a caption leaves the choice open, so that short prompts work well."""
    background = "black" if colour == "white" else "white"
    return {"size": "large", "position": "in the centre", "background": background}


def _jittered(colour: str, rng: random.Random, spread: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in COLOURS[colour])


def draw_picture(scene: Scene, rng: random.Random, framed: bool = False) -> np.ndarray:
    """A uint8 picture (128, 128, 3) of a fully described scene, with small natural variation.

    `framed` adds a frame in the shape's colour: the style of the demo LoRA.
    """
    if not (scene.position and scene.background and scene.size):
        raise ValueError(f"only a fully described scene can be drawn, not {scene}")
    ground = _jittered(scene.background, rng, 6)
    radius = SIZES[scene.size] * rng.uniform(0.94, 1.06)
    x, y = (PICTURE_SIZE / 2 + offset + rng.uniform(-3, 3) for offset in POSITIONS[scene.position])
    colour = _jittered(scene.colour, rng, 6)
    picture = _drawn(scene.shape, Place(x, y, radius), ground, colour)
    if framed:
        picture = np.array(picture)
        picture[border_ring(0, FRAME_WIDTH)] = colour
    return picture


def border_ring(start: int, end: int) -> np.ndarray:
    """Mask (128, 128) of the pixels that are `start` to `end` pixels away from the border."""
    steps = np.minimum(np.arange(PICTURE_SIZE), np.arange(PICTURE_SIZE)[::-1])
    distance = np.minimum(steps[:, None], steps)
    return (distance >= start) & (distance < end)


def draw_at(scene: Scene, place: Place, rng: random.Random) -> np.ndarray:
    """A uint8 picture (128, 128, 3) of a scene's shape and colours, at a place that no caption names."""
    ground = _jittered(scene.background, rng, 6)
    return _drawn(scene.shape, place, ground, _jittered(scene.colour, rng, 6))


def draw_edges(shape: str, place: Place) -> np.ndarray:
    """The edge of a shape as a uint8 picture (128, 128, 3): a white line on black."""
    side = PICTURE_SIZE * _SUPERSAMPLING
    picture = Image.new("L", (side, side))
    points = _enlarged_outline(shape, place)
    width = round(EDGE_WIDTH * _SUPERSAMPLING)
    ImageDraw.Draw(picture).line([*points, *points[:2]], fill=255, width=width, joint="curve")
    reduced = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    return np.asarray(reduced.convert("RGB"))


def place_near(scene: Scene, rng: random.Random) -> Place:
    """A place that is roughly what the scene says, but that its caption does not tell; in the picture."""
    radius = SIZES[scene.size] * rng.uniform(0.75, 1.2)
    margin = radius + EDGE_WIDTH
    x, y = (
        min(max(PICTURE_SIZE / 2 + offset + rng.uniform(-18, 18), margin), PICTURE_SIZE - margin)
        for offset in POSITIONS[scene.position]
    )
    return Place(x, y, radius)


def _enlarged_outline(shape: str, place: Place) -> list[tuple[float, float]]:
    return [
        ((place.x + place.radius * u) * _SUPERSAMPLING, (place.y + place.radius * v) * _SUPERSAMPLING)
        for u, v in shape_outline(shape)
    ]


def _drawn(shape: str, place: Place, ground: tuple[int, ...], colour: tuple[int, ...]) -> np.ndarray:
    side = PICTURE_SIZE * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), ground)
    ImageDraw.Draw(picture).polygon(_enlarged_outline(shape, place), fill=colour)
    return np.asarray(picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX))
