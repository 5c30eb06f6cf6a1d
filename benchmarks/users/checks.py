"""Runs of which theory knows the answer: the same simulation, policies and hosts, without switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.users import theory
from benchmarks.users.estimates import Estimate
from benchmarks.users.hosts import FREE, Host, Service, Switching
from benchmarks.users.jobs import poisson
from benchmarks.users.policies import Affinity, OwnQueues, Policy, SharedQueue
from benchmarks.users.simulation import run

ONE = {"a": 1.0}
TWO = {"a": 1.0, "b": 9.0}  # seconds, asked for as often: squared coefficient of variation 0.64
COUNT = 40_000


@dataclass(frozen=True)
class Case:
    """A queue with a closed form.

    Args:
        seconds: of service by kind, all asked for as often.
        load: share of the hosts' time.
        expected: mean wait by arrival rate and mean service.
    """

    name: str
    servers: int
    load: float
    seconds: Mapping[str, float]
    exponential: bool
    policy: Callable[[list[Host]], Policy]
    expected: Callable[[float, float], float]

    @property
    def mean(self) -> float:
        """Mean seconds of service."""
        return sum(self.seconds.values()) / len(self.seconds)

    @property
    def rate(self) -> float:
        """Requests per second of all hosts."""
        return self.load * self.servers / self.mean

    @property
    def wait(self) -> float:
        """The closed form."""
        return self.expected(self.rate, self.mean)


@dataclass(frozen=True)
class Checked:
    """What the simulation said: mean wait, and the share of their time that hosts worked."""

    case: Case
    wait: Estimate
    busy: float

    def holds(self, confidence: float = 0.999) -> bool:
        """Whether the closed form lies in the confidence interval."""
        return self.wait.holds(self.case.wait, confidence)


def _own(hosts: list[Host]) -> Policy:
    return OwnQueues(hosts, seed=0)


CASES = (
    Case("M/M/1", 1, 0.7, ONE, True, SharedQueue, theory.mm1),
    Case("M/D/1", 1, 0.7, ONE, False, SharedQueue, theory.md1),
    Case("M/G/1 (Pollaczek-Khinchine)", 1, 0.7, TWO, False, SharedQueue, lambda r, s: theory.mg1(r, s, 0.64)),
    Case("M/M/8 (Erlang C)", 8, 0.8, ONE, True, SharedQueue, lambda r, s: theory.mmc(r, s, 8)),
    Case("M/M/64 (Erlang C)", 64, 0.95, ONE, True, SharedQueue, lambda r, s: theory.mmc(r, s, 64)),
    Case("M/M/8, by model, all loaded", 8, 0.8, ONE, True, Affinity, lambda r, s: theory.mmc(r, s, 8)),
    Case("8 x M/G/1, a queue per host", 8, 0.7, TWO, False, _own, lambda r, s: theory.mg1(r / 8, s, 0.64)),
)


def check(case: Case, seed: int, count: int = COUNT) -> Checked:
    """Run a case.

    Raises:
        ArithmeticError: Little's law does not hold.
    """
    services = {kind: Service(seconds) for kind, seconds in case.seconds.items()}
    hosts = [Host(i, services, 0.0, FREE) for i in range(case.servers)]
    shares = dict.fromkeys(case.seconds, 1.0)
    jobs = poisson(case.rate, shares, count, seed, case.exponential)
    outcome = run(jobs, hosts, case.policy(hosts))
    return Checked(case, outcome.wait, outcome.busy)


def switched_load(seed: int, count: int = COUNT) -> tuple[float, float]:
    """Share of its time that a host with room for one of two models works: simulated, and by theory.

    Served in the order they come, every other request finds the other's model there.
    """
    services = {kind: Service(1.0, weights=1.0, model=kind) for kind in ("a", "b")}
    switching, load = Switching(rate=2.0), 0.7  # half a second to load
    mean = 1.0 + 0.5 * 0.5
    hosts = [Host(0, services, 1.0, switching)]
    jobs = poisson(load / mean, {"a": 1.0, "b": 1.0}, count, seed)
    return run(jobs, hosts, SharedQueue(hosts)).busy, load
