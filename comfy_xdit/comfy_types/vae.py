"""VAE: the stock class over meta tensors, with decode and encode done by the ranks."""

from __future__ import annotations

import logging
import math
from typing import Any, NoReturn

import comfy.model_management
import comfy.sd
import torch

from comfy_xdit.comfy_types.interruption import interrupted, interruptible
from comfy_xdit.comfy_types.model.patcher import HANDLE, RemotePatcher
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META
from comfy_xdit.remote import RemoteVAE as Handle


class RemoteVAE(comfy.sd.VAE):
    """A VAE for every stock node. Attributes (ratios, channels, devices) are the stock ones.

    Whole pictures are the ranks' work. In the tiled nodes stock ComfyUI cuts, blends and counts,
    with the numbers it would have without us, and each tile is the ranks' work.
    """

    def decode(
        self, samples_in: torch.Tensor, vae_options: Any = None, *_: Any, tile: int = 0, **__: Any
    ) -> torch.Tensor:
        """Unscaled latents (B, C, [T,] H, W) to pictures (B, [T,] H, W, 3) in 0..1, on the output device.

        `tile` is the edge of tiles in pixels that are spread over the ranks; 0 is none.
        """
        latent = self._fitting(samples_in)
        with interruptible():
            pixels = getattr(self, HANDLE).decode(latent, interrupted=interrupted, tile=tile)
        return pixels.to(self.output_device)

    def decode_tiled(self, samples: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """As stock: in tiles with blended seams, one after the other."""
        return super().decode_tiled(self._fitting(samples), *args, **options)

    def encode(self, pixel_samples: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        """Pictures (B, [T,] H, W, 3) in 0..1, cropped to the VAE's multiple, to unscaled latents."""
        pixels = self.vae_encode_crop_pixels(pixel_samples) if pixel_samples.ndim == 4 else pixel_samples
        if self.latent_dim == 3 and pixels.ndim == 4:
            not_video = options.get("not_video")
            apart = self.not_video if not_video is None else not_video
            pixels = pixels.unsqueeze(1 if apart else 0)
        with interruptible():
            latent = getattr(self, HANDLE).encode(pixels[..., :3], interrupted=interrupted)
        return latent.to(self.output_device)

    def get_sd(self) -> NoReturn:
        """Refused: the weights are in the ranks."""
        raise InvalidInput(
            "the weights of an xDiT VAE are in the ranks, so it cannot be saved; use VAELoader for that."
        )

    def _fitting(self, latent: torch.Tensor) -> torch.Tensor:
        """The latent with the dimensions the VAE takes. Raises InvalidInput if it is another family's."""
        if self.latent_dim == 2 and latent.ndim == 5 and latent.shape[2] == 1:
            latent = latent[:, :, 0]
        if latent.ndim != self.latent_dim + 2 or latent.shape[1] != self.latent_channels:
            frames = "frames, " if self.latent_dim == 3 else ""
            raise InvalidInput(
                f"a latent of shape {tuple(latent.shape)} does not fit this VAE, which takes "
                f"(batch, {self.latent_channels}, {frames}height, width); use the VAE of the latent's model."
            )
        return latent


def vae_of(remote: Handle) -> RemoteVAE:
    """A VAE for every stock node, whose work is done by `remote`."""
    vae = _stock_vae()
    _describe(vae, remote.info)
    _send_calls_to(remote, vae.first_stage_model)
    vae.patcher = RemotePatcher(
        vae.first_stage_model, vae.device, comfy.model_management.vae_offload_device()
    )
    setattr(vae, HANDLE, remote)
    vae.__class__ = RemoteVAE
    return vae


def decode_latent(vae: RemoteVAE, latent: torch.Tensor, tile: int) -> torch.Tensor:
    """XDiTVAEDecode's work: (B, [T,] H, W, 3) in 0..1."""
    return vae.decode(latent, tile=tile)


def _describe(vae: comfy.sd.VAE, info: dict[str, Any]) -> None:
    """Give the twin the sizes of the real one, as ComfyUI states them."""
    space, time = info["spatial_compression"], info["temporal_compression"]
    vae.latent_channels = info["latent_channels"]
    vae.vae_dtype = torch.float32  # what is sent; the ranks compute in their own
    vae.memory_used_encode = vae.memory_used_decode = lambda *_: 1  # of the host
    vae.upscale_ratio = vae.downscale_ratio = space
    vae.latent_dim = 2
    if time is None:
        return
    vae.latent_dim, vae.not_video = 3, not info["batch_is_video"]
    vae.upscale_ratio = (lambda frames: max(0, frames * time - (time - 1)), space, space)
    vae.downscale_ratio = (lambda frames: max(0, math.floor((frames + time - 1) / time)), space, space)
    vae.upscale_index_formula = vae.downscale_index_formula = (time, space, space)


def _send_calls_to(remote: Handle, twin: torch.nn.Module) -> None:
    """What stock code asks of the network goes to the ranks: a tile, in the network's own numbers."""

    def decode(latent: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        with interruptible():
            return remote.decode_unclamped(latent, interrupted=interrupted)

    def encode(pixels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        with interruptible():
            return remote.encode_scaled(pixels, interrupted=interrupted)

    for name, call in (("decode", decode), ("encode", encode)):
        object.__setattr__(twin, name, call)  # nn.Module's own would do the same, more slowly


def _stock_vae() -> comfy.sd.VAE:
    """A stock AutoencoderKL without weights: only its attributes and its tiling count."""
    shapes = {"decoder.conv_in.weight": torch.empty(512, 4, 3, 3, device=META)}
    log = logging.getLogger()
    log.addFilter(_not_about_missing_keys)  # all are, on purpose
    try:
        with META:
            return comfy.sd.VAE(sd=shapes)
    finally:
        log.removeFilter(_not_about_missing_keys)


def _not_about_missing_keys(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Missing VAE keys")
