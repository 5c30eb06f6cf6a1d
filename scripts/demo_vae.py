"""The demo model's autoencoder: trained on drawn pictures, scaled to SD3's latent constants."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from demo_pictures import PICTURE_SIZE, Scene, draw_picture
from diffusers import AutoencoderKL
from moving_average import MovingAverage
from torch import nn

# ComfyUI's SD3 latent format has these two built in; the autoencoder must agree with them.
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
LATENT_CHANNELS = 16
_CROP = 64
_CROP_BATCH, _FULL_BATCH = 32, 10
_FULL_SHARE = 0.25  # of the steps: whole pictures, so that borders and large areas are right too
_KL_WEIGHT = 1e-3
_LEARNING_RATE = 2e-3


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SD3_SCALE,
        shift_factor=SD3_SHIFT,
    )


def to_tensor(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (height, width, 3) pictures as a batch (n, 3, height, width) from -1 to 1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1


def to_pictures(batch: torch.Tensor) -> list[np.ndarray]:
    scaled = ((batch.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).numpy())


def _batch(scenes: Sequence[Scene], rng: random.Random, whole: bool) -> torch.Tensor:
    if whole:
        return to_tensor([draw_picture(rng.choice(scenes), rng) for _ in range(_FULL_BATCH)])
    crops = []
    for _ in range(_CROP_BATCH):
        picture = draw_picture(rng.choice(scenes), rng)
        x, y = rng.randint(0, PICTURE_SIZE - _CROP), rng.randint(0, PICTURE_SIZE - _CROP)
        crops.append(picture[y : y + _CROP, x : x + _CROP])
    return to_tensor(crops)


def _loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample.float()
    difference = drawn - pictures
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return difference.abs().mean() + difference.square().mean() + _KL_WEIGHT * divergence


def train_vae(scenes: Sequence[Scene], steps: int, report: Callable[[str], None]) -> AutoencoderKL:
    """Train on crops first (cheap, many edges), on whole pictures at the end."""
    vae = build_vae().train()
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    average = MovingAverage([vae], 0.99)
    start = time.monotonic()
    for step in range(steps):
        loss = _loss(vae, _batch(scenes, rng, whole=step >= steps * (1 - _FULL_SHARE)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.monotonic() - start
            report(f"vae {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s")
    average.swap()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def adopt_sd3_constants(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Rescale the latents so that (z - shift) * scale has mean 0 and deviation 1 for SD3's values.

    An affine map of the latents folds into the encoder's last convolution and, inverted,
    into the decoder's first one: the pictures stay the same.
    """
    latents = vae.encode(pictures).latent_dist.mode()
    gain = 1 / (SD3_SCALE * latents.std())
    offset = SD3_SHIFT - gain * latents.mean()
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    # The encoder's output is the posterior's mean, then its log variance.
    last.weight[:LATENT_CHANNELS] *= gain
    last.bias[:LATENT_CHANNELS] = last.bias[:LATENT_CHANNELS] * gain + offset
    last.bias[LATENT_CHANNELS:] += 2 * gain.log()
    first.weight /= gain
    first.bias -= first.weight.sum((1, 2, 3)) * offset


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them: mean 0, deviation 1."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = vae.encode(pictures).latent_dist.mode().float()
    return (latents - SD3_SHIFT) * SD3_SCALE


@torch.no_grad()
def signal_to_noise(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding: the ceiling for the model."""
    drawn = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (drawn - pictures).square().mean()))
