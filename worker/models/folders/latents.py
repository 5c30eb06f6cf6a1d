"""The latents of a model, by the VAE of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.description import LatentSpace
from comfy_xdit.protocol.errors import InvalidInput


def latent_space(words: Mapping[str, Any], patch: tuple[int, ...], file: Path) -> LatentSpace:
    """What a VAE's configuration says of latents.

    Args:
        words: the arguments of the VAE's class.
        patch: elements of a token along each dimension.
        file: where `words` are from, for messages.

    Raises:
        InvalidInput: it says nothing of them.
    """
    channels = words.get("latent_channels", words.get("z_dim"))
    levels = words.get("block_out_channels") or words.get("encoder_block_out_channels")
    space = words.get("spatial_compression_ratio", words.get("scale_factor_spatial"))
    space = space or (2 ** (len(levels) - 1) if levels else None)
    if not isinstance(channels, int) or not isinstance(space, int):
        raise InvalidInput(
            f"{file} says neither how many channels a latent has nor how much smaller it is than a picture; "
            "choose a complete diffusers folder."
        )
    time = words.get("temporal_compression_ratio", words.get("scale_factor_temporal"))
    time = time or math.prod(words.get("temporal_expansions") or (1,))
    mean, shift = words.get("latents_mean"), words.get("shift_factor")
    return LatentSpace(
        channels,
        dimensions=len(patch),
        compression=space,
        frames=int(time),
        patch=patch,
        scale=float(words.get("scaling_factor") or 1.0),
        mean=tuple(mean) if mean else (float(shift),) if shift else (),
        std=tuple(words.get("latents_std") or ()),
    )
