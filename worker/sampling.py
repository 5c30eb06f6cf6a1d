"""Sampling loops in the ranks, with the numbers of k-diffusion as ComfyUI runs it.

Flow models only: x = sigma * noise + (1 - sigma) * latent, denoised = x - sigma * prediction.
Formulas: Karras et al. 2022 (euler, heun), Lu et al. 2022 (DPM-Solver++ 2M).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from comfy_xdit.errors import InvalidInput
from comfy_xdit.messages import Sample
from worker.batch import Batch, join
from worker.loop import Run
from worker.parallel import RankGroups
from worker.transformer import Transformer

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, sigma) -> denoised
AfterStep = Callable[[int, torch.Tensor], None]  # (steps done, denoised)


def euler(model: Model, x: torch.Tensor, sigmas: torch.Tensor, after: AfterStep) -> torch.Tensor:
    """Euler's method (Karras algorithm 2 without churn)."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        after(i + 1, denoised)
    return x


def heun(model: Model, x: torch.Tensor, sigmas: torch.Tensor, after: AfterStep) -> torch.Tensor:
    """Heun's second-order method; the last step, to sigma 0, is Euler's."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        slope, step = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] != 0:
            ahead = x + slope * step
            slope = (slope + (ahead - model(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + slope * step
        after(i + 1, denoised)
    return x


def dpmpp_2m(model: Model, x: torch.Tensor, sigmas: torch.Tensor, after: AfterStep) -> torch.Tensor:
    """DPM-Solver++ (2M), in t = -log sigma."""
    times, before = sigmas.log().neg(), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        target, h = denoised, times[i + 1] - times[i]
        if before is not None and sigmas[i + 1] != 0:
            ratio = (times[i] - times[i - 1]) / h
            target = (1 + 1 / (2 * ratio)) * denoised - (1 / (2 * ratio)) * before
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * target
        before = denoised
        after(i + 1, denoised)
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def sample(request: Sample, transformer: Transformer, groups: RankGroups, run: Run) -> torch.Tensor:
    """Run the whole loop on every rank alike; returns the last latent (B, C, H, W), scaled.

    Raises:
        InvalidInput: an unknown sampler, or a latent or conditioning that does not fit.
        Interrupted: at a step boundary, on all ranks at the same step.
    """
    if request.sampler not in SAMPLERS:
        raise InvalidInput(
            f"sampler {request.sampler!r} does not run in the ranks ({', '.join(SAMPLERS)} do); "
            "choose one of them, or the stock KSampler with this MODEL."
        )
    positive = transformer.check(request.latent, request.positive)
    transformer.check(request.noise, request.positive)
    negative = None if request.negative is None else transformer.check(request.latent, request.negative)
    steps = len(request.sigmas) - 1
    if steps < 1:
        return request.latent
    model = _guided(request, transformer, positive, negative)
    if request.mask is not None:
        model = _masked(model, request)

    def after(step: int, denoised: torch.Tensor) -> None:
        run.step(step, steps, denoised if request.previews and groups.rank == 0 else None)

    x = _noised(request, request.sigmas[0])
    return SAMPLERS[request.sampler](model, x, request.sigmas, after)


def _noised(request: Sample, sigma: torch.Tensor) -> torch.Tensor:
    return sigma * request.noise + (1.0 - sigma) * request.latent


def _guided(
    request: Sample,
    transformer: Transformer,
    positive: dict[str, Any],
    negative: dict[str, Any] | None,
) -> Model:
    """Classifier-free guidance on the denoised latents, as ComfyUI computes it.

    Both sides are one batch, whose rows the branches share, or two where one batch cannot hold them.
    """
    sides = [positive] if negative is None else [negative, positive]
    joined = join(sides)
    batches = sides if joined is None else [joined]

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([x] * (len(sides) // len(batches)))
        timestep = (sigma * request.multiplier).expand(rows.shape[0])
        predictions = [transformer.predict_batch(Batch(rows, timestep, given)) for given in batches]
        outputs = torch.cat(predictions).chunk(len(sides))
        denoised = [x - sigma * output for output in outputs]
        if negative is None:
            return denoised[0]
        without, guided = denoised
        return without + (guided - without) * request.cfg

    return model


def _masked(model: Model, request: Sample) -> Model:
    """Keep the picture where the mask is 0, as ComfyUI's inpainting does around every call."""
    keep = 1.0 - request.mask

    def masked(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        x = x * request.mask + _noised(request, sigma) * keep
        return model(x, sigma) * request.mask + request.latent * keep

    return masked
