"""Noise levels (sigmas) of a sampling run, with the numbers ComfyUI's KSampler uses.

Every schedule walks over a table of the noise levels the model was trained on, or over the range
between its ends. The names are ComfyUI's, so that a shared workflow means the same here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import SCHEDULERS

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6  # both parameters of the beta distribution
QUADRATIC_THRESHOLD = 0.025  # noise removed by the linear half of linear_quadratic
ZERO = 1e-5  # a noise level this close to 0 is taken for 0
FULL_DENOISE = 0.9999


def sigmas_of(sampling: Sampling, scheduler: str, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """Noise levels of a run as KSampler plans it.

    Args:
        scheduler: a name of SCHEDULERS.
        steps: how many steps are to be run, at least 1.
        denoise: the share of the noise range that is walked; the steps keep their number.

    Returns:
        (steps + 1,) float32, falling, ending in 0; empty when `denoise` is 0. `beta` and
        `ddim_uniform` may differ by some steps, as in ComfyUI.

    Raises:
        InvalidInput: an unknown scheduler, steps below 1, denoise outside 0..1, or a schedule that
            is not defined for so few steps.
    """
    if scheduler not in SCHEDULERS:
        raise InvalidInput(
            f"scheduler {scheduler!r} is not one of {', '.join(SCHEDULERS)}; choose one of them."
        )
    if steps < 1:
        raise InvalidInput(f"steps is {steps}; a run has at least 1 step. Set steps to 1 or more.")
    if not 0.0 <= denoise <= 1.0:
        raise InvalidInput(f"denoise is {denoise}; set it between 0 (change nothing) and 1 (draw anew).")
    schedule = _SCHEDULES[scheduler]
    if denoise > FULL_DENOISE:
        return schedule(sampling, steps)
    if denoise == 0.0:
        return torch.empty(0)
    return schedule(sampling, int(steps / denoise))[-(steps + 1) :]


def _ending_in_zero(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def _normal(sampling: Sampling, steps: int) -> torch.Tensor:
    first, last = _ends(sampling)
    if math.isclose(float(sampling.sigma(last)), 0.0, abs_tol=ZERO):
        return sampling.sigma(torch.linspace(first, last, steps + 1))
    return _ending_in_zero(sampling.sigma(torch.linspace(first, last, steps)))


def _sgm_uniform(sampling: Sampling, steps: int) -> torch.Tensor:
    return _ending_in_zero(sampling.sigma(torch.linspace(*_ends(sampling), steps + 1)[:-1]))


def _ends(sampling: Sampling) -> list[torch.Tensor]:
    """Time at the highest and at the lowest noise level.

    ComfyUI takes a flow's sigma itself for its time, so its shift acts twice on the last one.
    """
    return [sampling.time(torch.tensor(sigma)) for sigma in (sampling.sigma_max, sampling.sigma_min)]


def _simple(sampling: Sampling, steps: int) -> torch.Tensor:
    stride = len(sampling.table) / steps
    places = [len(sampling.table) - 1 - int(step * stride) for step in range(steps)]
    return _ending_in_zero(sampling.table[places])


def _ddim_uniform(sampling: Sampling, steps: int) -> torch.Tensor:
    first_is_zero = math.isclose(float(sampling.table[1]), 0.0, abs_tol=ZERO)
    stride = max(len(sampling.table) // (steps + first_is_zero), 1)
    sigmas = sampling.table[1::stride].flip(0)
    return sigmas.clone() if first_is_zero else _ending_in_zero(sigmas)


def _karras(sampling: Sampling, steps: int) -> torch.Tensor:
    low, high = sampling.sigma_min ** (1 / KARRAS_RHO), sampling.sigma_max ** (1 / KARRAS_RHO)
    return _ending_in_zero((high + torch.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO)


def _exponential(sampling: Sampling, steps: int) -> torch.Tensor:
    logs = torch.linspace(math.log(sampling.sigma_max), math.log(sampling.sigma_min), steps)
    return _ending_in_zero(logs.exp())


def _beta(sampling: Sampling, steps: int) -> torch.Tensor:
    """Arxiv 2407.12173: quantiles of a beta distribution; places that fall together count once."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise InvalidInput(
            "scheduler 'beta' needs scipy, which is not installed; run `pip install scipy` "
            "or choose another scheduler."
        ) from error
    quantiles = [1 - step / steps for step in range(steps)]
    last = len(sampling.table) - 1
    places = [round(place) for place in beta.ppf(quantiles, BETA_SHAPE, BETA_SHAPE) * last]
    return _ending_in_zero(sampling.table[list(dict.fromkeys(places))])


def _linear_quadratic(sampling: Sampling, steps: int) -> torch.Tensor:
    """A line for the first half of the steps, then a parabola that joins it and ends in 0."""
    linear = steps // 2
    if linear == 0:
        return torch.tensor([sampling.sigma_max, 0.0])
    rest = steps - linear
    slope = QUADRATIC_THRESHOLD / linear
    bend = (linear - QUADRATIC_THRESHOLD * steps) / (linear * rest**2)
    # The parabola through the end of the line, with `bend`, that reaches 1 at the last step.
    lean = slope - 2 * bend * linear
    done = [slope * step for step in range(linear)]
    done += [bend * step**2 + lean * step + bend * linear**2 for step in range(linear, steps)]
    return torch.tensor([1.0 - share for share in [*done, 1.0]]) * sampling.sigma_max


def _kl_optimal(sampling: Sampling, steps: int) -> torch.Tensor:
    if steps < 2:
        raise InvalidInput(
            "scheduler 'kl_optimal' is not defined for 1 step; set steps to 2 or more, or use 'simple'."
        )
    ramp = torch.arange(steps) / (steps - 1)
    angles = ramp * math.atan(sampling.sigma_min) + (1 - ramp) * math.atan(sampling.sigma_max)
    return _ending_in_zero(angles.tan())


_SCHEDULES: dict[str, Callable[[Sampling, int], torch.Tensor]] = {
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "normal": _normal,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
}
