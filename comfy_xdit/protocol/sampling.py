"""How a model turns time into noise, and what it predicts: the ranks say it, the host plans runs by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from comfy_xdit.protocol.errors import InvalidInput

TABLE_SIZES = {"flow": 1000, "exponential_flow": 10000, "discrete": 1000}
PREDICTIONS = ("flow", "epsilon", "v")
EVER = 999999999.9  # above every noise level, as ComfyUI writes it
# What is left of the signal at the last of a zero terminal SNR table, whose noise would be infinite.
LAST_SIGNAL = 4.8973451890853435e-08


@dataclass(frozen=True)
class Sampling:
    """How a model turns time into noise, with the numbers of ComfyUI's model_sampling.

    Args:
        kind: of TABLE_SIZES: "flow" (a linear shift), "exponential_flow" or "discrete" (a table of betas).
        shift: how much of the time a flow spends at high noise.
        multiplier: what turns sigma into a flow transformer's timestep.
        prediction: of PREDICTIONS, "flow" with the flow kinds.
        betas: the first and the last of a table; `even_roots`: their square roots are evenly spaced, as
            diffusers' "scaled_linear" has them, and not they themselves.
        snr_shift: what the table's ratio of signal to noise is divided by (CogVideoX).
        zero_snr: the table ends in noise alone.
    """

    kind: str
    shift: float = 1.0
    multiplier: float = 1.0
    prediction: str = "flow"
    betas: tuple[float, float] = (0.00085, 0.012)
    even_roots: bool = True
    snr_shift: float = 1.0
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in TABLE_SIZES or self.prediction not in PREDICTIONS:
            raise InvalidInput(
                f"sampling kind {self.kind!r} is not one of {', '.join(TABLE_SIZES)}, or prediction "
                f"{self.prediction!r} not one of {', '.join(PREDICTIONS)}; use a model this version knows."
            )
        if (self.kind == "discrete") == (self.prediction == "flow"):
            raise InvalidInput(
                f"sampling kind {self.kind!r} does not go with prediction {self.prediction!r}: a discrete "
                "table is for epsilon and v, and all others are for flow; use a model this version knows."
            )

    @cached_property
    def table(self) -> torch.Tensor:
        """The noise levels the model was trained on, rising."""
        if self.kind == "discrete":
            return self._discrete.float()
        size = TABLE_SIZES[self.kind]
        return self._level(torch.arange(1, size + 1) / size)

    @cached_property
    def _logs(self) -> torch.Tensor:
        return self._discrete.log().float()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time at noise levels of any shape: of a flow the level itself, else a place in the table."""
        if self.kind != "discrete":
            return sigma
        apart = sigma.log() - self._logs.view(-1, *[1] * sigma.ndim)
        return apart.abs().argmin(dim=0).float()

    def sigma(self, time: torch.Tensor) -> torch.Tensor:
        """Noise level at `time`, any shape: 0..1 of a flow, 0 to the last place of a table."""
        if self.kind != "discrete":
            return self._level(time)
        time = time.float().clamp(0, len(self.table) - 1)
        below, above, share = time.floor().long(), time.ceil().long(), time.frac()
        return ((1 - share) * self._logs[below] + share * self._logs[above]).exp()

    def timesteps(self, sigmas: torch.Tensor) -> torch.Tensor:
        """What the transformer gets at noise levels of any shape."""
        return self.time(sigmas) * self.multiplier

    def sigma_at(self, percent: float) -> float:
        """Noise level where this share of a run is done, as ComfyUI's percent_to_sigma says."""
        discrete = self.kind == "discrete"
        if not 0.0 < percent < 1.0:
            return float(percent <= 0.0) * (EVER if discrete else 1.0)
        left = 1.0 - percent
        if not discrete:
            return self._level(left)
        return float(self.sigma(torch.tensor(left * (len(self.table) - 1))))

    def begins_at_most(self, sigmas: torch.Tensor) -> bool:
        """Whether a run with these noise levels begins at the highest of the model, or above it."""
        first = float(sigmas[0])
        return math.isclose(self.sigma_max, first, rel_tol=1e-5) or first > self.sigma_max

    @property
    def sigma_min(self) -> float:
        """The smallest noise level of the table."""
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        """The largest noise level of the table: 1 for every flow model."""
        return float(self.table[-1])

    def _level(self, time: torch.Tensor | float) -> torch.Tensor | float:
        if self.kind == "exponential_flow":
            scale = math.exp(self.shift)
            return scale / (scale + (1 / time - 1))
        return self.shift * time / (1 + (self.shift - 1) * time)

    @cached_property
    def _discrete(self) -> torch.Tensor:
        size = TABLE_SIZES[self.kind]
        first, last = (beta**0.5 if self.even_roots else beta for beta in self.betas)
        betas = torch.linspace(first, last, size, dtype=torch.float64)
        signal = torch.cumprod(1.0 - (betas**2 if self.even_roots else betas), 0)  # alpha bar
        signal = signal / (self.snr_shift + (1.0 - self.snr_shift) * signal)
        if self.zero_snr:  # arXiv:2305.08891, algorithm 1
            root = signal.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            signal = root**2
            signal[-1] = LAST_SIGNAL
        return ((1 - signal) / signal).sqrt()
