"""Hint pictures of ControlNets: what a picture must be, and what becomes of it on the way to the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput

Encoder = Callable[[torch.Tensor], torch.Tensor]  # (B, H, W, 3) in 0..1 to unscaled latents


def check_picture(image: Any) -> None:
    """Raise InvalidInput unless it is an IMAGE: (B, H, W, 3 or more), finite, not empty."""
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] < 3 or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise InvalidInput(
            f"the hint picture is {shape}; a ControlNet takes (pictures, height, width, 3), each at least 1: "
            "connect an IMAGE output."
        )
    if not torch.isfinite(image).all():
        raise InvalidInput(
            "the hint picture holds values that are not finite (NaN or infinity); check the node it is from."
        )


def pixel_hint(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The hint of a ControlNet that takes pictures: (B, H, W, 3 or more) scaled to (B, 3, *size)."""
    return scaled(_channels_first(image), *size).contiguous()


def latent_hint(
    name: str, image: torch.Tensor, latent: torch.Tensor, encode: Encoder, ratio: int
) -> torch.Tensor:
    """The hint of a ControlNet that takes latents: scaled to the picture that is drawn, and encoded.

    Args:
        name: of the ControlNet, for messages.
        image: (B, H, W, 3 or more) in 0..1.
        latent: what is drawn, (B, C, H, W).
        encode: the VAE's.
        ratio: pixels per latent pixel of that VAE.

    Raises:
        InvalidInput: the VAE gives something else than latents of this model.
    """
    height, width = latent.shape[-2:]
    hint = encode(scaled(_channels_first(image), height * ratio, width * ratio).movedim(1, -1))
    hint = hint.float()
    if hint.ndim != 4 or hint.shape[1:] != latent.shape[1:]:
        raise InvalidInput(
            f"the VAE makes latents of shape {tuple(hint.shape)} of the hint picture, the model draws "
            f"{tuple(latent.shape)}; connect the VAE of this model to the node that applies the ControlNet."
        )
    if not torch.isfinite(hint).all():
        raise InvalidInput(
            f"the VAE makes values that are not finite of the hint picture for {name}; use a VAE in "
            "fp32 or bf16."
        )
    return hint.contiguous()


def _channels_first(image: torch.Tensor) -> torch.Tensor:
    return image[..., :3].movedim(-1, 1).float()


def scaled(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) cut around its centre to the aspect asked for, then resized to the nearest pixels.

    Raises:
        InvalidInput: the picture is so narrow that nothing is left.
    """
    rows, columns = picture.shape[-2:]
    down = across = 0
    if columns * height > width * rows:
        across = round((columns - columns * ((width / height) / (columns / rows))) / 2)
    elif columns * height < width * rows:
        down = round((rows - rows * ((columns / rows) / (width / height))) / 2)
    part = picture[..., down : rows - down, across : columns - across]
    if 0 in part.shape:
        raise InvalidInput(
            f"the hint picture is {columns} x {rows} pixels, of which nothing is left at the aspect of "
            f"{width} x {height}; use a picture closer to that shape."
        )
    return torch.nn.functional.interpolate(part, (height, width), mode="nearest-exact")
