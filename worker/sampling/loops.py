"""Sampling loops in the ranks: what a request asks for, over whole latents."""

from __future__ import annotations

from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from worker.loop import Run
from worker.parallel import RankGroups
from worker.sampling.guidance import Guidance
from worker.sampling.pipefusion import PipeFusion
from worker.sampling.samplers import SAMPLERS, Sampler
from worker.transformer import Batch, NetCall, Pictures, Transformer, join, same_nets

Conditions = dict[str, Any]
Nets = tuple[NetCall, ...]


def sample(
    request: Sample,
    transformer: Transformer,
    groups: RankGroups,
    run: Run,
    negative_nets: Nets = (),
    positive_nets: Nets = (),
) -> torch.Tensor | None:
    """Run the whole loop; returns the last latent, scaled: on rank 0, maybe on others.

    Raises:
        InvalidInput: an unknown sampler, or a latent or conditioning that does not fit.
        Interrupted: at a step boundary, on all ranks at the same step.
    """
    if request.sampler not in SAMPLERS:
        raise InvalidInput(
            f"sampler {request.sampler!r} does not run in the ranks ({', '.join(SAMPLERS)} do); "
            "choose one of them, or the stock KSampler with this MODEL."
        )
    positive = transformer.check(request.latent, request.positive, nets=positive_nets)
    transformer.check(request.noise, request.positive)
    sides, nets = [positive], [positive_nets]
    if request.negative is not None:
        negative = transformer.check(request.latent, request.negative, nets=negative_nets)
        sides, nets = [negative, positive], [negative_nets, positive_nets]
    if len(request.sigmas) < 2:
        return request.latent
    # Both sides are one batch, whose rows the branches share, or two where one batch cannot hold them.
    joined = join(sides) if same_nets(nets[0], nets[-1]) else None
    batches = sides
    if joined is not None:
        batches, nets = [joined], [tuple(net.repeated(len(sides)) for net in positive_nets)]
    if groups.degrees.stages > 1:
        return PipeFusion(request, transformer, groups, run, batches).sample()
    return _whole(request, transformer, groups, run, list(zip(batches, nets, strict=True)))


def _whole(
    request: Sample,
    transformer: Transformer,
    groups: RankGroups,
    run: Run,
    batches: list[tuple[Conditions, Nets]],
) -> torch.Tensor:
    """Every rank alike, one evaluation after the other."""
    guidance = Guidance.of(request)
    sampler = Sampler(request.sampler, guidance.start(request.sigmas[0]), request.sigmas)
    steps = len(request.sigmas) - 1
    count, device = len(request.latent), request.latent.device
    is_negative = torch.zeros(guidance.sides * count, dtype=torch.bool, device=device)
    if guidance.sides == 2:  # the negative side comes first
        is_negative[:count] = True
    negatives = is_negative.chunk(len(batches))
    while (asked := sampler.wanted) is not None:
        rows = torch.cat([guidance.inputs(asked.x, asked.sigma)] * (guidance.sides // len(batches)))
        timestep = request.timesteps[asked.level].expand(rows.shape[0])
        prompts = [prompt for prompt in request.image_prompts if prompt.acts(float(asked.sigma))]
        outputs = []
        for (given, nets), negative in zip(batches, negatives, strict=True):
            acting = tuple(net for net in nets if net.acts_at(asked.sigma))
            pictures = Pictures.of(prompts, negative)
            outputs.append(transformer.predict_batch(Batch(rows, timestep, given, None, acting, pictures)))
        sampler.advance(guidance.denoised(asked.x, asked.sigma, torch.cat(outputs)))
        if sampler.wanted is None or sampler.wanted.step > asked.step:
            shown = sampler.denoised if request.previews and groups.rank == 0 else None
            run.step(asked.step + 1, steps, shown)
    return sampler.x
