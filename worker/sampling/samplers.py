"""Sampling formulas, with the numbers of k-diffusion as ComfyUI runs it.

A sampler is a generator: it asks for an evaluation of the model and is sent the denoised latent. All
formulas are pointwise, so a generator may run over a whole latent or over a part of one.
Of what the model predicts they know nothing (worker/sampling/prediction.py).
Formulas: Karras et al. 2022 (euler, heun), Lu et al. 2022 (DPM-Solver++ 2M).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Evaluation:
    """What a sampler wants to know: the denoised latent at `x` and `sigma`, in step `step` (from 0).

    `level` is the place of `sigma` in the noise levels of the run.
    """

    step: int
    x: torch.Tensor
    sigma: torch.Tensor
    level: int


Formula = Generator[Evaluation, torch.Tensor, torch.Tensor]


def euler(x: torch.Tensor, sigmas: torch.Tensor) -> Formula:
    """Euler's method (Karras algorithm 2 without churn)."""
    for i in range(len(sigmas) - 1):
        denoised = yield Evaluation(i, x, sigmas[i], i)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def heun(x: torch.Tensor, sigmas: torch.Tensor) -> Formula:
    """Heun's second-order method; the last step, to sigma 0, is Euler's."""
    for i in range(len(sigmas) - 1):
        denoised = yield Evaluation(i, x, sigmas[i], i)
        slope, step = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] != 0:
            ahead = x + slope * step
            denoised = yield Evaluation(i, ahead, sigmas[i + 1], i + 1)
            slope = (slope + (ahead - denoised) / sigmas[i + 1]) / 2
        x = x + slope * step
    return x


def dpmpp_2m(x: torch.Tensor, sigmas: torch.Tensor) -> Formula:
    """DPM-Solver++ (2M), in t = -log sigma."""
    times, before = sigmas.log().neg(), None
    for i in range(len(sigmas) - 1):
        denoised = yield Evaluation(i, x, sigmas[i], i)
        target, h = denoised, times[i + 1] - times[i]
        if before is not None and sigmas[i + 1] != 0:
            ratio = (times[i] - times[i - 1]) / h
            target = (1 + 1 / (2 * ratio)) * denoised - (1 / (2 * ratio)) * before
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * target
        before = denoised
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


class Sampler:
    """One run of a formula: what it asks for now, or what came of it.

    Args:
        name: of SAMPLERS.
        x: where to start, any shape.
        sigmas: (steps + 1,), steps at least 1.
    """

    def __init__(self, name: str, x: torch.Tensor, sigmas: torch.Tensor):
        self._formula = SAMPLERS[name](x, sigmas)
        self.wanted: Evaluation | None = next(self._formula)
        self.x = x  # where the run is
        self.denoised = x  # by the first evaluation of the last step that has one: what a preview shows
        self._begins = True  # whether what is wanted is the first evaluation of its step

    def advance(self, denoised: torch.Tensor) -> None:
        """Answer what is wanted. At the end `wanted` is None, and `x` the result."""
        step = self.wanted.step
        if self._begins:
            self.denoised = denoised
        try:
            self.wanted = self._formula.send(denoised)
        except StopIteration as end:
            self.wanted, self.x = None, end.value
            return
        self.x, self._begins = self.wanted.x, self.wanted.step > step


def schedule(name: str, sigmas: torch.Tensor) -> list[tuple[int, int]]:
    """Step and noise level of every evaluation of a run, which do not depend on what is sampled."""
    run, result = Sampler(name, sigmas.new_zeros(()), sigmas), []
    while run.wanted is not None:
        result.append((run.wanted.step, run.wanted.level))
        run.advance(sigmas.new_zeros(()))
    return result
