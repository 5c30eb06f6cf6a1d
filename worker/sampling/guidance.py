"""Around the transformer in one evaluation of a sampler: mask and guidance. All pointwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from comfy_xdit.protocol.messages import Sample
from worker.sampling.prediction import Prediction, prediction_of


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance on the denoised latents, and inpainting around it, as ComfyUI computes them.

    Args:
        noise, latent, mask: of the request, in one arrangement; mask is 1 where the picture may change.
        cfg: scale of the guidance.
        sides: prompts per picture: 2 are the negative and the positive one, 1 is no guidance.
        prediction: what the model predicts.
        most: the run begins at the model's highest noise level.
    """

    noise: torch.Tensor
    latent: torch.Tensor
    mask: torch.Tensor | None
    cfg: float
    sides: int
    prediction: Prediction
    most: bool

    @classmethod
    def of(
        cls, request: Sample, arranged: Callable[[torch.Tensor], torch.Tensor] = lambda latent: latent
    ) -> Guidance:
        """Of a request, whose latents are `arranged` in another way if asked."""
        mask = None if request.mask is None else arranged(request.mask.expand(request.latent.shape))
        sides = 1 if request.negative is None else 2
        noise, latent = arranged(request.noise), arranged(request.latent)
        return cls(noise, latent, mask, request.cfg, sides, prediction_of(request), request.most)

    def part(self, elements: torch.Tensor) -> Guidance:
        """The same for some elements of dimension 1."""
        mask = None if self.mask is None else self.mask[:, elements]
        return replace(self, noise=self.noise[:, elements], latent=self.latent[:, elements], mask=mask)

    def start(self, sigma: torch.Tensor) -> torch.Tensor:
        """Where a run starts whose first noise level is `sigma`."""
        return self.prediction.noised(sigma, self.noise, self.latent, self.most)

    def inputs(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the transformer gets for `x`."""
        return self.prediction.inputs(self._masked(x, sigma), sigma)

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The denoised latent, by what the transformer gave for `x`; both sides behind one another."""
        x = self._masked(x, sigma)
        denoised = [self.prediction.denoised(x, sigma, output) for output in outputs.chunk(self.sides)]
        result = denoised[-1]
        if self.sides == 2:
            result = denoised[0] + (denoised[1] - denoised[0]) * self.cfg
        return result if self.mask is None else result * self.mask + self.latent * (1.0 - self.mask)

    def _masked(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Where the mask is 0, the picture that is kept."""
        if self.mask is None:
            return x
        return x * self.mask + self.prediction.noised(sigma, self.noise, self.latent) * (1.0 - self.mask)
