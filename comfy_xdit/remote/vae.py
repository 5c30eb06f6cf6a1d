"""The handle of a VAE in the ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from comfy_xdit.protocol.errors import RemoteError
from comfy_xdit.protocol.messages import Decode, Encode
from comfy_xdit.protocol.parallel import available_devices
from comfy_xdit.remote.base import Interrupt, Remote

RETRY_TILES = (512, 256)  # pixels: the first one at most half of what a rank could not do
_log = logging.getLogger(__name__)


@dataclass
class RemoteVAE(Remote):
    """A VAE over all ranks. `note` says what was special about the last call; mostly nothing."""

    note: str = field(default="", compare=False)

    def decode(
        self, latent: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """Unscaled latents, as in a LATENT socket, to pictures in 0..1.

        Args:
            latent: (B, C, H, W), or (B, C, T, H, W) of a VAE for videos.
            interrupted: asked whether the person wants to stop.
            tile: edge of tiles in pixels; 0 is the whole picture at once, and tiles only if the
                ranks run out of memory.

        Returns:
            (B, H * 8, W * 8, 3) or (B, T, H * 8, W * 8, 3), fp32 on CPU; 8 is the VAE's compression.
        """
        pixels = self.decode_unclamped(latent, interrupted, tile)
        return ((pixels + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1).contiguous()

    def decode_unclamped(
        self, latent: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """As `decode`, but (B, 3, [T,] H, W) and about -1..1: what the network gives."""
        ratio = self._ratio(interrupted)
        sides = [side * ratio for side in latent.shape[-2:]]
        return self._tiled_if_needed(Decode(self.spec, latent, tile), sides, interrupted)["pixels"]

    def encode(
        self, pixels: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """Pictures (B, [T,] H, W, 3) in 0..1 to unscaled latents (B, C, [T,] H / 8, W / 8)."""
        scaled = pixels[..., :3].movedim(-1, 1).float() * 2.0 - 1.0
        return self.encode_scaled(scaled, interrupted, tile)

    def encode_scaled(
        self, pixels: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """As `encode`, of (B, 3, [T,] H, W) in -1..1: what the network takes."""
        message = Encode(self.spec, pixels.contiguous(), tile)
        return self._tiled_if_needed(message, pixels.shape[-2:], interrupted)["latent"]

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel."""
        return self._ratio(None)

    @property
    def _world_size(self) -> int:
        return self.parallel.check(available_devices()).world_size

    def _ratio(self, interrupted: Interrupt | None) -> int:
        return (self.info or self.load(interrupted))["spatial_compression"]

    def _tiled_if_needed(
        self, message: Decode | Encode, sides: Sequence[int], interrupted: Interrupt | None
    ) -> dict[str, Any]:
        """The ranks' answer; if they run out of memory, once more in tiles, and `note` says so.

        Args:
            sides: height and width in pixels.
        """
        self.note = ""
        try:
            value = self._call(message, interrupted=interrupted).value
        except RemoteError as error:
            if not error.out_of_memory or message.tile:
                raise
            share = sides[0] * sides[1] / self._world_size
            tile = next((size for size in RETRY_TILES if 2 * size**2 <= share), RETRY_TILES[-1])
            self.note = (
                f"rank {error.rank} ran out of memory with the whole picture, so it was done in tiles of "
                f"{tile} pixels, which differ a little at their seams. More ranks, or a smaller picture, "
                "avoid that."
            )
            _log.warning("comfy_xdit: %s", self.note)
            return self._call(replace(message, tile=tile), interrupted=interrupted).value
        self.note = self._about_ranks(value["ranks"], sides[0] // self._ratio(interrupted))
        return value

    def _about_ranks(self, worked: int, rows: int) -> str:
        """A sentence if some ranks had nothing to do."""
        ranks = self._world_size
        if worked == ranks:
            return ""
        why = (
            f"the latent has {rows} rows, one for each rank are needed"
            if rows < ranks
            else f"this work of an {self.info['family']} cannot be spread; decoding in tiles can"
        )
        return f"{worked} of {ranks} ranks did the work: {why}."
