"""The VAE of a pipeline, whole in one rank (DistVAE will spread it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from comfy_xdit.errors import InvalidInput
from comfy_xdit.spec import ModelSpec
from worker.checkpoints import Checkpoint, read_json


class VAE:
    """diffusers' AutoencoderKL. LATENT sockets hold unscaled latents, so nothing is scaled here."""

    def __init__(self, spec: ModelSpec, device: torch.device):
        path = Path(spec.path)
        folder = path / "vae" if (path / "model_index.json").exists() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name") != "AutoencoderKL":
            raise InvalidInput(
                f"{folder} holds a {config.get('_class_name')}; this version decodes AutoencoderKL."
            )
        # Names a damaged or pickled file before diffusers trips over it.
        self.nbytes = Checkpoint.at(folder).elements * torch.float32.itemsize
        self._folder, self._device = folder, device

    def load(self) -> None:
        """Read the weights, as fp32."""
        from diffusers import AutoencoderKL

        self._module = AutoencoderKL.from_pretrained(self._folder, local_files_only=True).float()
        self._module.to(self._device).eval().requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """What the host needs to know."""
        config = self._module.config
        return {
            "latent_channels": config.latent_channels,
            "spatial_compression": 2 ** (len(config.block_out_channels) - 1),
        }

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) unscaled latents to pictures (B, H*8, W*8, 3) in 0..1, fp32."""
        channels = self._module.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise InvalidInput(
                f"the latent has shape {tuple(latent.shape)}, this VAE decodes (batch, {channels}, height, "
                "width); use the VAE of the model that made the latent."
            )
        if not torch.isfinite(latent).all():
            raise InvalidInput(
                "the latent holds values that are not finite (NaN or infinity); check the sampler before."
            )
        pictures = self._module.decode(latent.float(), return_dict=False)[0]
        return ((pictures + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1).contiguous()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures (B, H, W, 3) in 0..1 to unscaled latents: the mean of the posterior, as ComfyUI takes."""
        if pixels.ndim != 4 or pixels.shape[-1] < 3:
            raise InvalidInput(
                f"the picture has shape {tuple(pixels.shape)}, the VAE encodes (batch, height, width, 3)."
            )
        scaled = pixels[..., :3].movedim(-1, 1).float() * 2.0 - 1.0
        step = self.describe()["spatial_compression"]
        height, width = (n // step * step for n in scaled.shape[-2:])
        top, left = ((n - m) // 2 for n, m in zip(scaled.shape[-2:], (height, width), strict=True))
        centre = scaled[..., top : top + height, left : left + width]
        return self._module.encode(centre.contiguous()).latent_dist.mode()
