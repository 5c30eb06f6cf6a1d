"""Pictures as files and as IMAGE tensors (B, H, W, 3) in 0..1, as ComfyUI's stock nodes treat them."""

from __future__ import annotations

import json
import re
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from comfy_xdit.headless.folders import Folders, prefix_problem, why
from comfy_xdit.protocol.errors import InvalidInput

COMPRESSION = 4  # ComfyUI's
# What Pillow raises for a damaged picture, by its format's reader.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)
NO_MASK_SIDE = 64  # of the mask of a picture without transparency


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Every frame of a picture file that has the size of the first.

    Returns:
        (B, H, W, 3) in 0..1, and the mask (B, H, W), 1 where the picture is transparent;
        (B, 64, 64) of zeros when it has no transparency.

    Raises:
        InvalidInput: the file is no picture, damaged, or has too many pixels.
    """
    try:
        frames = _frames(path)
    except Image.DecompressionBombError as error:
        raise InvalidInput(f"{path} is too large: {error}; scale it down.") from error
    except _DAMAGED as error:
        raise InvalidInput(f"{path} cannot be read as a picture: {error}; choose a PNG or JPEG.") from error
    frames = [frame for frame in frames if frame.size == frames[0].size]
    masks = [_mask(f) for f in frames]
    transparent = any(mask is not None for mask in masks)
    opaque = torch.zeros(frames[0].size[::-1] if transparent else (NO_MASK_SIDE, NO_MASK_SIDE))
    return (
        torch.stack([_pixels(f) for f in frames]),
        torch.stack([opaque if mask is None else mask for mask in masks]),
    )


def save(
    images: torch.Tensor,
    prefix: str,
    folders: Folders,
    prompt: dict[str, Any],
    extra: Mapping[str, Any],
) -> list[dict[str, str]]:
    """Write each picture as `<prefix>_<number>_.png` behind those already there.

    Args:
        images: (B, H, W, 3) in 0..1.
        prompt: the API workflow; becomes the text chunk "prompt".
        extra: further text chunks by name, such as "workflow".

    Returns:
        ComfyUI's description of the files.

    Raises:
        InvalidInput: `images` are none, `prefix` cannot be the name of a file in the output folder, or
            it cannot be written.
    """
    problem = prefix_problem(prefix)
    if problem is not None:
        raise InvalidInput(f"{problem}.")
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        shape = tuple(getattr(images, "shape", ()))
        raise InvalidInput(f"images has the shape {shape}, not (batch, height, width, 3); connect an IMAGE.")
    output = folders.output.resolve()
    target = output / _filled_in(prefix, images)
    if not target.resolve().is_relative_to(output):  # by a link in the folder
        raise InvalidInput(f"filename_prefix {prefix!r} leads out of {folders.output}; choose another one.")
    chunks = PngInfo()
    for name, value in {"prompt": prompt, **extra}.items():
        chunks.add_text(name, json.dumps(value))
    described = []
    for place, image in enumerate(images):
        levels = (image.float().cpu().numpy() * 255.0).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        path = _write(picture, target.with_name(target.name.replace("%batch_num%", str(place))), chunks)
        folders.written.append(path)
        subfolder = path.parent.relative_to(output).as_posix()
        described.append({"filename": path.name, "subfolder": subfolder.removeprefix("."), "type": "output"})
    return described


def _write(picture: Image.Image, target: Path, chunks: PngInfo) -> Path:
    """Write the next `<target>_<number>_.png`, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f"{target.name}_{_next_number(target.parent, target.name):05}_.png")
        try:
            picture.save(path, pnginfo=chunks, compress_level=COMPRESSION)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InvalidInput(f"{target} cannot be written: {why(error)}; name another folder.") from error
    return path


def resized(image: torch.Tensor, method: str, width: int, height: int, crop: bool) -> torch.Tensor:
    """(B, H, W, C) to (B, height, width, C). A side of 0 follows from the other; both 0 change nothing.

    Args:
        crop: cut to the new proportion around the centre first, instead of distorting.
    """
    if width == 0 and height == 0:
        return image
    old_height, old_width = image.shape[1:3]
    width = width or max(1, round(old_width * height / old_height))
    height = height or max(1, round(old_height * width / old_width))
    if crop:
        left = max(0, round((old_width - old_height * width / height) / 2))
        top = max(0, round((old_height - old_width * height / width) / 2))
        image = image[:, top : old_height - top, left : old_width - left]
    channels_first = image.movedim(-1, 1)
    return F.interpolate(channels_first, size=(height, width), mode=method).movedim(1, -1)


def cropped_to_multiple(pixels: torch.Tensor, multiple: int) -> torch.Tensor:
    """(B, H, W, C) cut around its centre to sides that `multiple` divides.

    Raises:
        InvalidInput: a side is shorter than `multiple`.
    """
    for axis in (1, 2):
        side = pixels.shape[axis]
        if side < multiple:
            raise InvalidInput(
                f"the picture is {pixels.shape[2]}x{pixels.shape[1]}; the VAE takes sides of {multiple} "
                "pixels or more. Scale it up."
            )
        pixels = pixels.narrow(axis, side % multiple // 2, side - side % multiple)
    return pixels


def _frames(path: Path) -> list[Image.Image]:
    """Every frame of the file, decoded. Pillow refuses a frame of too many pixels, and so do we of all."""
    with Image.open(path) as image:
        most = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow's refusal begins
        frames: list[Image.Image] = []
        for frame in ImageSequence.Iterator(image):
            if (len(frames) + 1) * image.width * image.height > most:
                raise Image.DecompressionBombError(f"its frames have more than {most} pixels")
            frames.append(ImageOps.exif_transpose(frame))
        return frames[:1] if image.format == "MPO" else frames  # further ones are other views, not pictures


def _pixels(frame: Image.Image) -> torch.Tensor:
    if frame.mode == "I":  # 16 bit
        frame = frame.point(lambda level: level * (1 / 255))
    return torch.from_numpy(np.array(frame.convert("RGB")).astype(np.float32) / 255.0)


def _mask(frame: Image.Image) -> torch.Tensor | None:
    if frame.mode == "P" and "transparency" in frame.info:
        frame = frame.convert("RGBA")
    if "A" not in frame.getbands():
        return None
    return 1.0 - torch.from_numpy(np.array(frame.getchannel("A")).astype(np.float32) / 255.0)


def _filled_in(prefix: str, images: torch.Tensor) -> str:
    """`prefix` with ComfyUI's %width%, %height% and %year% ... %second% filled in."""
    now = time.localtime()
    values = {"width": str(images.shape[2]), "height": str(images.shape[1]), "year": str(now.tm_year)}
    names = ("month", "day", "hour", "minute", "second")
    values |= {name: f"{value:02}" for name, value in zip(names, now[1:6], strict=True)}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def _next_number(folder: Path, name: str) -> int:
    pattern = re.compile(rf"{re.escape(name)}_(\d+)_?.*")
    numbers = [int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name))]
    return max(numbers, default=0) + 1
