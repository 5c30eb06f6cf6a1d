"""The autoencoders a rank runs: diffusers' classes, and what a LATENT socket holds for each.

LATENT sockets hold what ComfyUI's own VAE class of the family takes. That is the decoder's input,
except where ComfyUI counts a normalisation to the VAE and diffusers to the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput


@dataclass(frozen=True)
class Geometry:
    """Sizes of a latent against pictures.

    `temporal` is None for VAEs of pictures; for videos, so many frames beside the first one are one
    latent frame. `batch_is_video` says what ComfyUI makes of (B, H, W, 3) before such a VAE: one
    video of B frames, or B videos of one frame.
    """

    channels: int
    spatial: int
    temporal: int | None = None
    batch_is_video: bool = True

    @property
    def dimensions(self) -> int:
        """Dimensions of a latent: batch, channels, then frames if any, height, width."""
        return 4 if self.temporal is None else 5


class Autoencoder:
    """One diffusers class. Latents of the socket and of the decoder are the same here."""

    def __init__(self, geometry: Callable[[nn.Module], Geometry]):
        self.geometry = geometry

    def prepare(self, module: nn.Module) -> None:
        """Put right on the loaded module what diffusers does otherwise than ComfyUI."""

    def to_decoder(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        """What diffusers' decode takes, of what the socket holds."""
        return latent

    def to_pictures(self, decoded: torch.Tensor) -> torch.Tensor:
        """The network's output, about -1..1, of what diffusers' decode gives."""
        return decoded

    def to_socket(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        """What the socket holds, of what diffusers' encode gives."""
        return latent


class PackedAutoencoder(Autoencoder):
    """FLUX.2: four neighbouring places are one of the socket's, normalised by running statistics."""

    def to_decoder(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        mean, deviation = _running(module)
        return nn.functional.pixel_shuffle(latent * deviation + mean, module.config.patch_size[0])

    def to_socket(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        mean, deviation = _running(module)
        return (nn.functional.pixel_unshuffle(latent, module.config.patch_size[0]) - mean) / deviation


class ClampedAutoencoder(Autoencoder):
    """Wan and Qwen-Image: diffusers clamps every output, ComfyUI blends its tiles before it clamps.

    The last layer is scaled down, by a power of two and so without rounding, until the clamp meets nothing.
    """

    HEADROOM = 64.0

    def prepare(self, module: nn.Module) -> None:
        last = module.decoder.conv_out
        for parameter in (last.weight, last.bias):
            parameter.data = parameter.data / self.HEADROOM

    def to_pictures(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded * self.HEADROOM


class NormalisedAutoencoder(Autoencoder):
    """LTX: the file holds a mean and a deviation per channel."""

    def to_decoder(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        return latent * _per_channel(module.latents_std) + _per_channel(module.latents_mean)

    def to_socket(self, module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        return (latent - _per_channel(module.latents_mean)) / _per_channel(module.latents_std)


def _running(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = (t.view(1, -1, 1, 1) for t in (module.bn.running_mean, module.bn.running_var))
    return mean, torch.sqrt(variance + module.config.batch_norm_eps)


def _per_channel(statistic: torch.Tensor) -> torch.Tensor:
    return statistic.view(1, -1, 1, 1, 1)


def _halvings(module: nn.Module) -> int:
    return 2 ** (len(module.config.block_out_channels) - 1)


def _stated(module: nn.Module, batch_is_video: bool = True) -> Geometry:
    ratios = module.spatial_compression_ratio, module.temporal_compression_ratio
    return Geometry(module.config.latent_channels, *ratios, batch_is_video)


def _qwen(module: nn.Module) -> Geometry:
    downsample = module.config.temperal_downsample
    return Geometry(module.config.z_dim, 2 ** len(downsample), 2 ** sum(downsample))


AUTOENCODERS: dict[str, Autoencoder] = {
    "AutoencoderKL": Autoencoder(lambda m: Geometry(m.config.latent_channels, _halvings(m))),
    "AutoencoderKLFlux2": PackedAutoencoder(
        lambda m: Geometry(4 * m.config.latent_channels, 2 * _halvings(m)),
    ),
    "AutoencoderKLWan": ClampedAutoencoder(
        lambda m: Geometry(m.config.z_dim, m.config.scale_factor_spatial, m.config.scale_factor_temporal)
    ),
    "AutoencoderKLQwenImage": ClampedAutoencoder(_qwen),
    "AutoencoderKLHunyuanVideo": Autoencoder(_stated),
    "AutoencoderKLHunyuanVideo15": Autoencoder(lambda m: _stated(m, batch_is_video=False)),
    "AutoencoderKLLTX2Video": NormalisedAutoencoder(_stated),
    "AutoencoderDC": Autoencoder(lambda m: Geometry(m.config.latent_channels, m.spatial_compression_ratio)),
    "AutoencoderKLCogVideoX": Autoencoder(
        lambda m: Geometry(m.config.latent_channels, _halvings(m), int(m.config.temporal_compression_ratio))
    ),
    "AutoencoderKLMochi": Autoencoder(_stated),
}


def diffusers_class(name: str, where: str) -> type[nn.Module]:
    """The class of this name.

    Raises:
        InvalidInput: not one of AUTOENCODERS, or diffusers is too old for it.
    """
    import diffusers

    if name not in AUTOENCODERS:
        raise InvalidInput(
            f"{where} holds a {name}; the ranks run {', '.join(AUTOENCODERS)}. Use the stock loader for it."
        )
    found = getattr(diffusers, name, None)
    if found is None:
        raise InvalidInput(
            f"{where} holds a {name}, which diffusers {diffusers.__version__} lacks; update diffusers."
        )
    return found
