"""How a family of models turns time into noise: the ranks say it, the host makes schedules of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from comfy_xdit.protocol.errors import InvalidInput

TABLE_SIZES = {"discrete_flow": 1000, "flux": 10000}
Time = TypeVar("Time", torch.Tensor, float)


@dataclass(frozen=True)
class Sampling:
    """How a family turns time into noise.

    Args:
        kind: "discrete_flow" (SD3, and every family with a linear shift) or "flux" (exponential).
        shift: how much of the time is spent at high noise.
        multiplier: what turns sigma into the timestep of the transformer.
    """

    kind: str
    shift: float
    multiplier: float

    def __post_init__(self) -> None:
        if self.kind not in TABLE_SIZES:
            raise InvalidInput(
                f"sampling kind {self.kind!r} is not one of {', '.join(TABLE_SIZES)}; "
                "use a model of a family this pack knows."
            )

    @cached_property
    def table(self) -> torch.Tensor:
        """The noise levels the model was trained on, rising."""
        size = TABLE_SIZES[self.kind]
        return self.sigma(torch.arange(1, size + 1) / size)

    @classmethod
    def of(cls, info: dict[str, Any]) -> Sampling:
        """From what the ranks say about a loaded model: `info["sampling"]`."""
        told = info["sampling"]
        return cls(told["kind"], float(told["shift"]), float(told["multiplier"]))

    def sigma(self, time: Time) -> Time:
        """Noise level at `time`, 0..1, any shape."""
        if self.kind == "flux":
            scale = math.exp(self.shift)
            return scale / (scale + (1 / time - 1))
        return self.shift * time / (1 + (self.shift - 1) * time)

    def sigma_at(self, percent: float) -> float:
        """Noise level where this share of a run is done, as ComfyUI's percent_to_sigma says."""
        if not 0.0 < percent < 1.0:
            return float(percent <= 0.0)
        return self.sigma(1.0 - percent)

    @property
    def sigma_min(self) -> float:
        """The smallest noise level of the table."""
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        """The largest noise level of the table: 1 for every flow model."""
        return float(self.table[-1])
