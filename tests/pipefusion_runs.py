"""Runs that the tests of PipeFusion compare: in the ranks, on plain diffusers, and of the plain algorithm."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.parity import multiplier
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import pipefusion_reference, tiny
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3
from worker.sampling.samplers import Sampler

EXACT = 1e-5
# Random weights, eight steps, one of them warm-up: measured 1e-4 to 8e-4.
DRIFT = 3e-3
ALL = 99
MODELS = ("sd3.5", "flux")
# 7 blocks: no number of stages divides them. Some of SD3.5 attend to image tokens a second time.
CONFIGS = {
    "sd3.5": (
        SD3(),
        tiny.SD35_CONFIG | {"num_layers": 7, "num_attention_heads": 2, "caption_projection_dim": 128},
    ),
    "flux": (Flux(), tiny.FLUX_CONFIG | {"num_layers": 3, "num_single_layers": 4}),
}


def write_models(root: Path) -> dict[str, tiny.TinyModel]:
    """Deeper models than those of `tiny`."""
    found = {}
    for name, (family, config) in CONFIGS.items():
        module = tiny.build(family, config)
        file = tiny.write_native(family, module, config, root / f"{name}.safetensors")
        found[name] = tiny.TinyModel(family, config, module, root, file)
    return found


def request(
    model, size=(15, 13), text=(17, 8), batch=1, steps=4, sampler="euler", cfg=3.0, mask=None
) -> Sample:
    """An odd picture, prompts of different odd length."""
    generator = torch.Generator().manual_seed(5)
    noise, latent = (torch.randn(batch, 16, *size, generator=generator) for _ in range(2))
    positive = tiny.conditions(model.family, model.config, text[0], batch, seed=3)
    negative = tiny.conditions(model.family, model.config, text[1], batch, seed=4) if cfg != 1 else None
    sigmas, spec = torch.linspace(1.0, 0.0, steps + 1), ModelSpec.of(model.file, "transformer")
    return Sample(
        spec, sampler, sigmas, latent, noise, cfg, positive, negative, sigmas * multiplier(model), mask
    )  # fmt: skip


def plain(model, asked: Sample) -> torch.Tensor:
    """The same run on plain diffusers, whole."""
    run = Sampler(asked.sampler, asked.noise * asked.sigmas[0], asked.sigmas)
    height, width = asked.noise.shape[-2:]
    while run.wanted is not None:
        x, sigma = run.wanted.x, run.wanted.sigma
        kept = sigma * asked.noise + (1 - sigma) * asked.latent
        x = x if asked.mask is None else torch.where(asked.mask > 0, x, kept)
        padded = torch.nn.functional.pad(x, (0, width % 2, 0, height % 2), mode="circular")
        t = asked.timesteps[run.wanted.level].expand(len(x))
        sides = [asked.positive] if asked.negative is None else [asked.negative, asked.positive]
        outputs = [tiny.reference(model.family, model.module, padded, t, side) for side in sides]
        output = outputs[0] if len(sides) == 1 else outputs[0] + asked.cfg * (outputs[1] - outputs[0])
        denoised = x - sigma * output[..., :height, :width]
        run.advance(denoised if asked.mask is None else torch.where(asked.mask > 0, denoised, asked.latent))
    return run.x


def drift(model, parallel: ParallelConfig, asked: Sample, expected: torch.Tensor, warmup: int) -> float:
    """Relative L2 of what a run did to its noise."""
    remote = RemoteModel(asked.spec, replace(parallel, warmup_steps=warmup))
    return tiny.relative_l2(remote.sample(asked) - asked.noise, expected - asked.noise)


def simulated(model, asked: Sample, patches: int) -> torch.Tensor:
    """The run of 15 x 13 tokens with one warm-up step, as the algorithm says. From noise alone."""
    cuts = {2: [0, 98, 195], 4: [0, 49, 98, 147, 195]}[patches]
    sides = [asked.positive] if asked.negative is None else [asked.positive, asked.negative]
    calls = {
        i: model.family.call(dict(model.module.config), asked.noise, torch.zeros(1), side).kwargs
        for i, side in enumerate(sides)
    }
    transformer = pipefusion_reference.StaleTransformer(model.module, calls)
    cfg = None if asked.negative is None else asked.cfg
    with torch.inference_mode():
        return pipefusion_reference.euler_run(
            transformer, asked.noise, asked.sigmas, asked.timesteps, list(pairwise(cuts)), 1, cfg
        )


def uneven(model, cfg: float) -> Sample:
    """15 x 13 tokens, which patches of one size do not make up."""
    return replace(request(model, (30, 26), steps=5, cfg=cfg), latent=torch.zeros(1, 16, 30, 26))
