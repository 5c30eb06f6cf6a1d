"""What a model predicts: how noise is mixed in, what the transformer gets, and what its output says.

One owner of the three formulas, as ComfyUI computes them. All are pointwise; sigma has no dimension.
Flow: Esser et al. 2024, arXiv:2403.03206. Epsilon and v, in the variance exploding form of Karras et al.
2022, arXiv:2206.00364: x = latent + sigma * noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample


@dataclass(frozen=True)
class Prediction(ABC):
    """One kind of prediction.

    Args:
        data: the standard deviation of latents that the model was trained for (sigma_data).
    """

    data: float = 1.0

    @abstractmethod
    def noised(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor, most: bool = False
    ) -> torch.Tensor:
        """`latent` at the noise level `sigma`; `most` where a run begins at the model's highest."""

    @abstractmethod
    def inputs(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the transformer gets for `x`."""

    @abstractmethod
    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The latent without noise, by the transformer's output for `x`."""


class Flow(Prediction):
    """The way from the latent to the noise, on a straight line between both."""

    def noised(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor, most: bool = False
    ) -> torch.Tensor:
        return sigma * noise + (1.0 - sigma) * latent

    def inputs(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return x - sigma * output


class Epsilon(Prediction):
    """The noise, of unit variance."""

    def noised(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor, most: bool = False
    ) -> torch.Tensor:
        return noise * ((1.0 + sigma**2).sqrt() if most else sigma) + latent

    def inputs(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / self._deviation(sigma)

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return x - sigma * output

    def _deviation(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma**2 + self.data**2) ** 0.5


class Velocity(Epsilon):
    """v of Salimans and Ho 2022, arXiv:2202.00512: noise and latent, each by the other's share."""

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        variance = sigma**2 + self.data**2
        return x * self.data**2 / variance - output * sigma * self.data / variance**0.5


PREDICTIONS: dict[str, type[Prediction]] = {"flow": Flow, "epsilon": Epsilon, "v": Velocity}


def prediction_of(request: Sample) -> Prediction:
    """What the model of a request predicts. Raises InvalidInput for a kind of another version."""
    if request.prediction not in PREDICTIONS:
        raise InvalidInput(
            f"prediction {request.prediction!r} is not one of {', '.join(PREDICTIONS)}; restart ComfyUI."
        )
    return PREDICTIONS[request.prediction](request.sigma_data)
