"""KSampler's own run over an xDiT MODEL: the host calls the ranks step by step."""

from __future__ import annotations

import comfy.sample
import comfy.utils
import latent_preview
import torch

from comfy_xdit.comfy_types.latents import fitting
from comfy_xdit.comfy_types.model.patcher import RemotePatcher
from comfy_xdit.nodes.surroundings import SamplerInputs


def drive(model: RemotePatcher, inputs: SamplerInputs) -> torch.Tensor:
    """The samples of KSampler's LATENT for these inputs: its noise, schedule, previews and interrupts."""
    latent = inputs.latent_image
    samples = fitting(model, latent)
    noise = comfy.sample.prepare_noise(samples, inputs.seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model,
        noise,
        inputs.steps,
        inputs.cfg,
        inputs.sampler_name,
        inputs.scheduler,
        inputs.positive,
        inputs.negative,
        samples,
        denoise=inputs.denoise,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, inputs.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=inputs.seed,
    )
