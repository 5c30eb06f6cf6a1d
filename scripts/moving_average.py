"""The average of a training run's weights, which draws better than the last step's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of parameters: smoother weights than the last step's."""

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        # A short memory at first: the random start must not linger in the average.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters; a second call undoes the first."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
