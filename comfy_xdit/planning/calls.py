"""What a run teaches the planner, the time of a transformer call, and what the planner knows before one."""

from __future__ import annotations

from typing import Any

from comfy_xdit.planning.auto import machine
from comfy_xdit.planning.measured import Measured, remember
from comfy_xdit.planning.prediction import predict
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.timing import Timing

# What a sampler does per step: Heun calls twice, but for the last step.
_CALLS = {"heun": lambda steps: 2 * steps - 1}


class Calls:
    """The calls of one handle. The first of a kind is slow (buffers, kernels) and does not count."""

    def __init__(self) -> None:
        self._before: Any = None
        self._guess: tuple[Any, float] = (None, 0.0)

    def note(
        self,
        described: ModelDescription,
        parallel: ParallelConfig,
        timing: Timing | None,
        latent: tuple[int, ...],
        cfg: bool = False,
        sampler: str | None = None,
        steps: int = 1,
    ) -> None:
        """A call, or a loop of `steps` under `sampler`, with a latent of this shape has ended.

        Args:
            described: the model.
            timing: of the call; the time of the slowest rank counts.
            cfg: whether the loop called with two prompts per picture.
        """
        before, self._before = self._before, (parallel, latent, cfg, sampler)
        if timing is None or self._before != before:
            return
        request = _request(described, latent, cfg, steps)
        remember(parallel, request, machine(parallel.devices), timing.rank / _calls(sampler, steps))

    def guess(
        self,
        described: ModelDescription,
        parallel: ParallelConfig,
        latent: tuple[int, ...],
        cfg: bool = False,
        sampler: str | None = None,
        steps: int = 1,
    ) -> float:
        """Seconds that a step may take: remembered, else predicted. Worked out once in a row of equal calls.

        Args: as of `note`.
        """
        asked = (parallel, latent, cfg, sampler, steps)
        if self._guess[0] != asked:
            request, cluster = _request(described, latent, cfg, steps), machine(parallel.devices)
            call = Measured.load().seconds(parallel, request, cluster)
            if call is None:
                call = predict(parallel, request, cluster).seconds
            self._guess = asked, call * _calls(sampler, steps) / max(1, steps)
        return self._guess[1]


def _calls(sampler: str | None, steps: int) -> int:
    return _CALLS.get(sampler, lambda n: n)(steps)


def _request(described: ModelDescription, latent: tuple[int, ...], cfg: bool, steps: int) -> Request:
    tokens, bytes_ = described.latent.tokens(latent), 4 if described.dtype == "float32" else 2
    return Request(ModelShape.of(described), tokens, described.text_tokens, steps, cfg, latent[0], bytes_)
