"""A mean of one run with its confidence interval, by batches, since neighbours in a queue are alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BATCHES = 20
# Student's t of BATCHES - 1 degrees of freedom: how many standard errors each side.
QUANTILES = {0.95: 2.093, 0.999: 3.883}


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    def half(self, confidence: float = 0.95) -> float:
        """Half of the width of the confidence interval."""
        return QUANTILES[confidence] * self.error

    def holds(self, value: float, confidence: float = 0.95) -> bool:
        """Whether `value` lies in the interval."""
        return abs(self.mean - value) <= self.half(confidence)


def of_batches(values: Sequence[float]) -> Estimate:
    """The mean of values in the order they came.

    Raises:
        ValueError: fewer values than batches.
    """
    size = len(values) // BATCHES
    if size == 0:
        raise ValueError(f"{len(values)} values; {BATCHES} batches need at least one each")
    means = [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(BATCHES)]
    return Estimate(statistics.fmean(means), statistics.stdev(means) / math.sqrt(BATCHES))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
