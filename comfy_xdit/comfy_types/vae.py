"""VAE: the stock class over meta tensors, with decode and encode done by the ranks."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import comfy.model_management
import comfy.sd
import torch

from comfy_xdit.comfy_types.interruption import interrupted, interruptible
from comfy_xdit.comfy_types.patcher import HANDLE, RemotePatcher
from comfy_xdit.comfy_types.twin import META
from comfy_xdit.errors import InvalidInput
from comfy_xdit.remote import RemoteVAE as Handle


class RemoteVAE(comfy.sd.VAE):
    """A VAE for every stock node. Attributes (ratios, channels, devices) are the stock ones."""

    def decode(self, samples_in: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(B, C, H, W) unscaled latents to (B, H*8, W*8, 3) pictures in 0..1, on the output device."""
        if samples_in.ndim == 5 and samples_in.shape[2] == 1:
            samples_in = samples_in[:, :, 0]
        if samples_in.ndim != 4 or samples_in.shape[1] != self.latent_channels:
            raise InvalidInput(
                f"a latent of shape {tuple(samples_in.shape)} does not fit this VAE, which takes "
                f"(batch, {self.latent_channels}, height, width); use the VAE of the latent's model."
            )
        with interruptible():
            pixels = getattr(self, HANDLE).decode(samples_in, interrupted=interrupted)
        return pixels.to(self.output_device)

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """As decode: tiles save memory on the host, and the host's memory is not used."""
        return self.decode(samples)

    def encode(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(B, H, W, 3) pictures in 0..1, cropped to the VAE's multiple, to unscaled latents."""
        pixels = self.vae_encode_crop_pixels(pixel_samples)[..., :3]
        with interruptible():
            latent = getattr(self, HANDLE).encode(pixels, interrupted=interrupted)
        return latent.to(self.output_device)

    def encode_tiled(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """As encode."""
        return self.encode(pixel_samples)

    def get_sd(self) -> NoReturn:
        """Refused: the weights are in the ranks."""
        raise InvalidInput(
            "the weights of an xDiT VAE are in the ranks, so it cannot be saved; use VAELoader for that."
        )


def vae_of(remote: Handle) -> RemoteVAE:
    """A VAE for every stock node, whose work is done by `remote`."""
    vae = _stock_vae(remote.info["latent_channels"])
    vae.upscale_ratio = vae.downscale_ratio = remote.info["spatial_compression"]
    vae.patcher = RemotePatcher(
        vae.first_stage_model, vae.device, comfy.model_management.vae_offload_device()
    )
    setattr(vae, HANDLE, remote)
    vae.__class__ = RemoteVAE
    return vae


def _stock_vae(latent_channels: int) -> comfy.sd.VAE:
    """A stock AutoencoderKL with `latent_channels` and without weights.

    Its widths are not those of the real one, which may have any: only the attributes count.
    """
    shapes = {"decoder.conv_in.weight": torch.empty(512, latent_channels, 3, 3, device=META)}
    log = logging.getLogger()
    log.addFilter(_not_about_missing_keys)  # all are, on purpose
    try:
        with META:
            return comfy.sd.VAE(sd=shapes)
    finally:
        log.removeFilter(_not_about_missing_keys)


def _not_about_missing_keys(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Missing VAE keys")
