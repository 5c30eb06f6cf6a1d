"""A sampling run cut into patches: each has a sampler of its own, which is at its own step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy_xdit.protocol.messages import Sample
from worker.models.base import PATCH, packed, to_whole_patches, unpacked
from worker.parallel.key_value_cache import Span
from worker.sampling.guidance import Guidance
from worker.sampling.samplers import Sampler


class PatchSampler:
    """The run of a request over patches of packed tokens (B, tokens, channels * 4).

    Args:
        patches: in order, and all tokens of the picture.
    """

    def __init__(self, request: Sample, patches: Sequence[Span]):
        guidance = Guidance.of(request, lambda latent: packed(to_whole_patches(latent)))
        self._shape, self._patches = request.latent.shape, list(patches)
        self._guidance = [guidance.part(*span) for span in patches]
        x = guidance.noised(request.sigmas[0])
        self._samplers = [
            Sampler(request.sampler, x[:, start:stop], request.sigmas) for start, stop in patches
        ]
        self._inputs = torch.empty_like(x)  # written to, where samplers still need their x
        self.inputs(range(len(patches)))

    def inputs(self, which: range) -> torch.Tensor:
        """What the transformer gets of some patches, for the evaluation each of them is at.

        The half patches of an odd picture are filled from its other side, which is in a patch before: it
        is at the same evaluation.
        """
        for p in which:
            wanted = self._samplers[p].wanted
            start, stop = self._patches[p]
            self._inputs[:, start:stop] = self._guidance[p].before(wanted.x, wanted.sigma)
        if self._shape[-2] % PATCH or self._shape[-1] % PATCH:
            self._inputs = packed(to_whole_patches(picture(self._inputs, self._shape)))
        return self._inputs[:, self._patches[which.start][0] : self._patches[which.stop - 1][1]].clone()

    def advance(self, which: range, outputs: torch.Tensor) -> None:
        """Take the transformer's outputs (sides * B, tokens, channels * 4) for the present inputs."""
        lengths = [self._patches[p][1] - self._patches[p][0] for p in which]
        for p, output in zip(which, outputs.split(lengths, 1), strict=True):
            start, stop = self._patches[p]
            x, sampler = self._inputs[:, start:stop], self._samplers[p]
            sampler.advance(self._guidance[p].after(x, sampler.wanted.sigma, output))

    def results(self, which: range) -> torch.Tensor:
        """Where the run is: at its end the last latent."""
        return torch.cat([self._samplers[p].x for p in which], 1)

    def denoised(self, which: range) -> torch.Tensor:
        """What a preview shows."""
        return torch.cat([self._samplers[p].denoised for p in which], 1)


def picture(tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Packed tokens as a latent of `shape`, whose half patches are cut."""
    height, width = shape[-2:]
    whole = (*shape[:2], height + -height % PATCH, width + -width % PATCH)
    return unpacked(tokens, whole)[..., :height, :width]
