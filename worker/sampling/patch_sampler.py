"""A sampling run cut into patches: each has a sampler of its own, which is at its own step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy_xdit.protocol.messages import Sample
from worker.sampling.guidance import Guidance
from worker.sampling.samplers import Sampler


class PatchSampler:
    """The run of a request over patches: elements of a picture, the same of every row.

    Args:
        places: of each patch the elements, in a picture without its batch dimension, flattened.
    """

    def __init__(self, request: Sample, places: Sequence[torch.Tensor]):
        guidance = Guidance.of(request, lambda latent: latent.flatten(1))
        x = guidance.start(request.sigmas[0])
        self._guidance = [guidance.part(own) for own in places]
        self._samplers = [Sampler(request.sampler, x[:, own], request.sigmas) for own in places]

    def inputs(self, patch: int) -> torch.Tensor:
        """What the transformer gets (B, elements), for the evaluation the patch is at."""
        wanted = self._samplers[patch].wanted
        return self._guidance[patch].inputs(wanted.x, wanted.sigma)

    def advance(self, patch: int, outputs: torch.Tensor) -> None:
        """Take the transformer's outputs (sides * B, elements) for the present inputs."""
        sampler = self._samplers[patch]
        wanted = sampler.wanted
        sampler.advance(self._guidance[patch].denoised(wanted.x, wanted.sigma, outputs))

    def result(self, patch: int) -> torch.Tensor:
        """Where the run is (B, elements): at its end the last latent."""
        return self._samplers[patch].x

    def denoised(self, patch: int) -> torch.Tensor:
        """What a preview shows (B, elements)."""
        return self._samplers[patch].denoised
