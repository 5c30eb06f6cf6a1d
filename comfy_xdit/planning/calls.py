"""What a run teaches the planner: the time of a transformer call, remembered for this machine."""

from __future__ import annotations

from typing import Any

from comfy_xdit.planning.auto import machine
from comfy_xdit.planning.measured import remember
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
        calls = _CALLS.get(sampler, lambda n: n)(steps)
        tokens, bytes_ = described.latent.tokens(latent), 4 if described.dtype == "float32" else 2
        request = Request(ModelShape.of(described), tokens, 0, steps, cfg, latent[0], bytes_)
        remember(parallel, request, machine(parallel.devices), timing.rank / calls)
