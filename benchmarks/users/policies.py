"""Who serves a request: one queue per host, one queue for all, or by what a host has loaded.

A policy is told of every arrival and of every host that becomes free, and answers with a host or a request.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from benchmarks.users.hosts import Host
from benchmarks.users.jobs import Job

PATIENCE = 60.0  # seconds that a request may be passed over by those whose model is loaded


class Policy(Protocol):
    """Keeps who waits and who is free."""

    def arrive(self, job: Job) -> Host | None:
        """The host that takes the request at once, or None: it waits."""

    def free(self, host: Host, now: float) -> Job | None:
        """The request that a host takes next, or None: it rests."""


class OwnQueues:
    """A queue per host, as ComfyUI has one; a request goes to a host at random and stays there.

    Args:
        choices: how many hosts are looked at, of which the shortest queue is taken.
    """

    def __init__(self, hosts: Sequence[Host], seed: int, choices: int = 1):
        self._hosts, self._choices = hosts, choices
        self._random = random.Random(f"{seed} routes")
        self._length = {host.number: 0 for host in hosts}
        self._queues: dict[int, deque[Job]] = {host.number: deque() for host in hosts}

    def arrive(self, job: Job) -> Host | None:
        tried = [self._hosts[self._random.randrange(len(self._hosts))] for _ in range(self._choices)]
        host = min(tried, key=lambda one: self._length[one.number])
        self._length[host.number] += 1
        if self._length[host.number] == 1:
            return host
        self._queues[host.number].append(job)
        return None

    def free(self, host: Host, now: float) -> Job | None:
        self._length[host.number] -= 1
        queue = self._queues[host.number]
        return queue.popleft() if queue else None


class SharedQueue:
    """One queue in order of arrival; of free hosts that which has rested longest."""

    def __init__(self, hosts: Sequence[Host]):
        self._queue: deque[Job] = deque()
        self._resting = deque(hosts)

    def arrive(self, job: Job) -> Host | None:
        if self._resting:
            return self._resting.popleft()
        self._queue.append(job)
        return None

    def free(self, host: Host, now: float) -> Job | None:
        if self._queue:
            return self._queue.popleft()
        self._resting.append(host)
        return None


class Affinity:
    """One queue, but hosts that have a request's model go first, and requests whose model a host has.

    A request that has waited for longer than `patience` is not passed over any more.
    """

    def __init__(self, hosts: Sequence[Host], patience: float = PATIENCE):
        self._patience = patience
        self._waiting: dict[str, deque[Job]] = {kind: deque() for kind in hosts[0].services}
        self._resting = {host.number: host for host in hosts}  # who has rested longest is first
        self._ready: dict[str, dict[int, Host]] = {kind: {} for kind in hosts[0].services}

    def arrive(self, job: Job) -> Host | None:
        if not self._resting:
            self._waiting[job.kind].append(job)
            return None
        host = self._resting_and_ready(job) or next(iter(self._resting.values()))
        del self._resting[host.number]
        for hosts in self._ready.values():
            hosts.pop(host.number, None)
        return host

    def free(self, host: Host, now: float) -> Job | None:
        heads = [queue[0] for queue in self._waiting.values() if queue]
        if not heads:
            self._rest(host, now)
            return None
        first = min(heads, key=lambda job: job.number)
        if now - first.arrival <= self._patience:
            loaded = [job for job in heads if host.ready(job.kind, now)]
            first = min(loaded, key=lambda job: job.number, default=first)
        return self._waiting[first.kind].popleft()

    def _rest(self, host: Host, now: float) -> None:
        self._resting[host.number] = host
        for kind, hosts in self._ready.items():
            if host.ready(kind, now):
                hosts[host.number] = host

    def _resting_and_ready(self, job: Job) -> Host | None:
        hosts = self._ready[job.kind]
        while hosts:
            number, host = next(iter(hosts.items()))
            if host.ready(job.kind, job.arrival):
                return host
            del hosts[number]  # its model was let go while it rested
        return None


class Pools:
    """A policy apart for some kinds: each knows hosts of its own.

    Args:
        of_kind: whom to ask, by kind; kinds may share a policy.
    """

    def __init__(self, of_kind: Mapping[str, Policy]):
        self._of_kind = of_kind
        self._took: dict[int, Policy] = {}

    def arrive(self, job: Job) -> Host | None:
        host = self._of_kind[job.kind].arrive(job)
        if host is not None:
            self._took[host.number] = self._of_kind[job.kind]
        return host

    def free(self, host: Host, now: float) -> Job | None:
        return self._took[host.number].free(host, now)
