"""Requests: when they come, for which model, and how much of its usual service each takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass
class Job:
    """One request.

    Args:
        number: in the order of arrival.
        arrival: seconds.
        kind: the model, and how much of it, by name.
        draw: its service in multiples of what the kind takes on a host.
        start: when its service (and a switch before it) began.
        switch: seconds of that until its model was there.
        end: when it was done.
    """

    number: int
    arrival: float
    kind: str
    draw: float = 1.0
    start: float = 0.0
    switch: float = 0.0
    end: float = 0.0

    @property
    def wait(self) -> float:
        """Seconds until a host took it."""
        return self.start - self.arrival

    @property
    def latency(self) -> float:
        """Seconds until it was done."""
        return self.end - self.arrival


def poisson(
    rate: float, shares: Mapping[str, float], count: int, seed: int, exponential: bool = False
) -> Iterator[Job]:
    """`count` independent requests, `rate` per second. The same seed gives the same kinds at any rate.

    Args:
        shares: how often each kind is asked for; they need not add up to 1.
        exponential: services vary so, and not at all otherwise.
    """
    times, kinds, draws = (random.Random(f"{seed} {name}") for name in ("times", "kinds", "draws"))
    names, weights = list(shares), list(itertools.accumulate(shares.values()))
    now = 0.0
    for number in range(count):
        now += times.expovariate(1.0) / rate
        (kind,) = kinds.choices(names, cum_weights=weights)
        yield Job(number, now, kind, draws.expovariate(1.0) if exponential else 1.0)
