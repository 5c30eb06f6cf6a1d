"""Queues with a closed form: mean seconds that a request waits before its service begins.

`rate` is requests per second (Poisson), `mean` seconds of service, `spread` the squared coefficient of
variation of the service (0: always equal, 1: exponential), `servers` how many serve one queue in order of
arrival.
Every function raises ValueError where the queue grows without end.
"""

from __future__ import annotations


def utilisation(rate: float, mean: float, servers: int = 1) -> float:
    """Share of the servers' time that is service."""
    return rate * mean / servers


def mm1(rate: float, mean: float) -> float:
    """One server, exponential service."""
    load = _stable(rate, mean, 1)
    return load * mean / (1 - load)


def md1(rate: float, mean: float) -> float:
    """One server, equal service."""
    load = _stable(rate, mean, 1)
    return load * mean / (2 * (1 - load))


def mg1(rate: float, mean: float, spread: float) -> float:
    """One server, any service: Pollaczek and Khinchine."""
    load = _stable(rate, mean, 1)
    return load * mean * (1 + spread) / (2 * (1 - load))


def erlang_c(rate: float, mean: float, servers: int) -> float:
    """Probability that a request finds all servers busy: several servers, exponential service."""
    load = _stable(rate, mean, servers)
    blocked = 1.0  # Erlang B, which loses who finds all busy, one server after the other
    for number in range(1, servers + 1):
        blocked = rate * mean * blocked / (number + rate * mean * blocked)
    return blocked / (1 - load * (1 - blocked))


def mmc(rate: float, mean: float, servers: int) -> float:
    """Several servers, exponential service."""
    return erlang_c(rate, mean, servers) * mean / (servers - rate * mean)


def mgc(rate: float, mean: float, spread: float, servers: int) -> float:
    """Several servers, any service: Lee and Longton's approximation; exact for one server or spread 1."""
    return (1 + spread) / 2 * mmc(rate, mean, servers)


def _stable(rate: float, mean: float, servers: int) -> float:
    load = utilisation(rate, mean, servers)
    if not 0 <= load < 1:
        raise ValueError(f"{rate:g} requests/s of {mean:g} s are {load:.2f} of what {servers} can serve")
    return load
