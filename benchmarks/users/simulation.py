"""The events of one run in the order of time: requests arrive, hosts become free."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.users.estimates import Estimate, of_batches, percentile
from benchmarks.users.hosts import Host
from benchmarks.users.jobs import Job
from benchmarks.users.policies import Policy

WARM = 0.2  # of the requests come before the queues are as usual, and are not counted
TOLERANCE = 1e-9  # of sums of floats


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        jobs: those that count, in the order of arrival.
        busy: share of the hosts' time, from the first to the last arrival that counts, that they worked.
    """

    jobs: Sequence[Job]
    busy: float

    @property
    def wait(self) -> Estimate:
        """Mean seconds before service."""
        return of_batches([job.wait for job in self.jobs])

    @property
    def latency(self) -> Estimate:
        """Mean seconds from arrival to end."""
        return of_batches([job.latency for job in self.jobs])

    def slowest(self, share: float = 0.95, kind: str | None = None) -> float:
        """Seconds from arrival to end that `share` of the requests do not exceed."""
        return percentile([job.latency for job in self.jobs if kind in (None, job.kind)], share)

    @property
    def switching(self) -> float:
        """Share of the time that hosts worked in which they loaded a model or started ranks."""
        return math.fsum(job.switch for job in self.jobs) / math.fsum(j.end - j.start for j in self.jobs)


def run(jobs: Iterable[Job], hosts: Sequence[Host], policy: Policy) -> Outcome:
    """Serve all jobs, which come in the order of arrival.

    Raises:
        ArithmeticError: a request was lost, or Little's law does not hold between what was integrated over
            the events and what the requests say themselves.
    """
    ends: list[tuple[float, int, Host, Job]] = []
    served: list[Job] = []
    clock = _Clock()

    def begin(host: Host, job: Job, now: float) -> None:
        job.start, job.switch = now, host.prepare(job.kind, now)
        job.end = now + job.switch + host.services[job.kind].seconds * job.draw
        clock.busy += 1
        heapq.heappush(ends, (job.end, host.number, host, job))

    def end_next() -> None:
        now, _, host, _ = heapq.heappop(ends)
        clock.advance(now)
        clock.inside -= 1
        clock.busy -= 1
        if (job := policy.free(host, now)) is not None:
            begin(host, job, now)

    for job in jobs:
        while ends and ends[0][0] <= job.arrival:
            end_next()
        clock.advance(job.arrival)
        clock.inside += 1
        served.append(job)
        if (host := policy.arrive(job)) is not None:
            begin(host, job, job.arrival)
    while ends:
        end_next()
    clock.check(served)
    counted = served[int(WARM * len(served)) :]
    return Outcome(counted, _busy(served, counted[0].arrival, counted[-1].arrival) / len(hosts))


class _Clock:
    """How many requests are inside and how many hosts work, integrated over time."""

    def __init__(self) -> None:
        self.inside = self.busy = 0
        self._now = self._inside_area = self._busy_area = 0.0

    def advance(self, now: float) -> None:
        """Nothing changed until `now`."""
        self._inside_area += self.inside * (now - self._now)
        self._busy_area += self.busy * (now - self._now)
        self._now = now

    def check(self, jobs: Sequence[Job]) -> None:
        """Little's law, of the whole system and of the hosts alone, over a run that begins and ends empty."""
        for what, area, seconds in (
            ("inside", self._inside_area, math.fsum(job.latency for job in jobs)),
            ("in service", self._busy_area, math.fsum(job.end - job.start for job in jobs)),
        ):
            if self.inside or self.busy or abs(area - seconds) > TOLERANCE * max(area, seconds):
                raise ArithmeticError(
                    f"{what}: {area!r} by the events, {seconds!r} by the requests; {self.inside} are left"
                )


def _busy(jobs: Sequence[Job], begin: float, end: float) -> float:
    """How many hosts worked, on average, between two moments."""
    inside = (min(job.end, end) - max(job.start, begin) for job in jobs)
    return math.fsum(seconds for seconds in inside if seconds > 0) / (end - begin)
