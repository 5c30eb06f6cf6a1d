"""The questions of docs/scale.md, each a table of runs. Same seed, same tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.users import fleet
from benchmarks.users.fleet import PER_MACHINE, PICTURES, SIZES, VIDEO, VIDEOS
from benchmarks.users.hosts import Host, Switching
from benchmarks.users.jobs import poisson
from benchmarks.users.policies import Affinity, OwnQueues, Policy, Pools, SharedQueue
from benchmarks.users.simulation import Outcome, run

# What benchmarks/users/reading.py measured.
FILE = Path(__file__).parent.parent.parent / "docs" / "users.json"
SEED, COUNT = 13, 12_000
GPUS = 64
CARD, VIDEO_CARD = "L40 PCIe", "H100 NVLink"
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
FULL = 0.985  # of their time: above, the queue of a run as short as these says nothing but that it grows
RESTART = 7.0  # seconds, docs/decisions/017: one core per rank imports; on GPUs ranks are not forked yet
KEPT_RESTART = 1.0  # the design's target for another layout of the same devices

POLICIES: dict[str, Callable[[list[Host]], Policy]] = {
    "own queues, at random": lambda hosts: OwnQueues(hosts, SEED),
    "own queues, shorter of two": lambda hosts: OwnQueues(hosts, SEED, choices=2),
    "one queue": SharedQueue,
    "one queue, by model": Affinity,
}


def measured() -> dict[str, Any]:
    """Bytes per second of every run, on which machine, and when."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def switchings() -> dict[str, Switching]:
    """What a switch costs today, with ComfyUI keeping outputs, and with ranks that keep weights too."""
    today = Switching(min(measured()["bytes_per_second"]), RESTART)
    held = replace(today, linger=math.inf)
    return {
        "today": today,
        "outputs kept": held,
        "and layouts kept": replace(held, restart=KEPT_RESTART, keeps=True),
    }


@dataclass(frozen=True)
class Fleet:
    """GPUs cut into groups of one size, and how requests find one."""

    gpu: str
    gpus: int
    size: int
    policy: str = "one queue, by model"

    def serve(
        self, shares: Mapping[str, float], rate: float, switching: Switching, count: int = COUNT
    ) -> Outcome:
        """`count` requests, `rate` per second."""
        hosts = fleet.hosts(self.gpu, self.gpus // self.size, self.size, list(shares), switching)
        return run(poisson(rate, shares, count, SEED), hosts, POLICIES[self.policy](hosts))

    def capacity(self, shares: Mapping[str, float]) -> float:
        """Requests per second at most."""
        return fleet.capacity(self.gpu, self.gpus, self.size, shares)


def cuts() -> Iterator[tuple[float, dict[int, Outcome | None]]]:
    """By requests per second and group size; None where the groups cannot serve so many."""
    today = switchings()["today"]
    top = Fleet(CARD, GPUS, 1).capacity(PICTURES)
    for load in LOADS:
        found: dict[int, Outcome | None] = {}
        for size in SIZES:
            one = Fleet(CARD, GPUS, size)
            fits = load * top < FULL * one.capacity(PICTURES)
            outcome = one.serve(PICTURES, load * top, today) if fits else None
            found[size] = outcome if outcome is not None and outcome.busy < FULL else None
        yield load * top, found


def policies(size: int, load: float) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """By policy and what a switch costs, at a share of what the groups serve without switches."""
    for name in POLICIES:
        one = Fleet(CARD, GPUS, size, name)
        rate = load * one.capacity(PICTURES)
        yield name, {what: one.serve(PICTURES, rate, cost) for what, cost in switchings().items()}


def reading_rates(load: float) -> Iterator[tuple[float, dict[str, Outcome]]]:
    """By bytes per second that a rank reads, and policy, on groups of one GPU; outputs kept."""
    held = switchings()["outputs kept"]
    for rate in (0.2e9, 1e9, 5e9):
        cost = replace(held, rate=rate)
        fleets = {name: Fleet(CARD, GPUS, 1, name) for name in POLICIES}
        asked = load * fleet.capacity(CARD, GPUS, 1, PICTURES)
        yield rate, {name: one.serve(PICTURES, asked, cost) for name, one in fleets.items()}


def sizes(load: float, machines: tuple[int, ...]) -> Iterator[tuple[int, dict[str, Outcome], float]]:
    """By machines: the policies on groups of one GPU, and the mean wait in theory without switches."""
    held = switchings()["outputs kept"]
    for count in machines:
        gpus = count * PER_MACHINE
        rate = load * Fleet(CARD, gpus, 1).capacity(PICTURES)
        jobs = COUNT + 4 * gpus  # a few for each host, which begin with nothing loaded
        found = {name: Fleet(CARD, gpus, 1, name).serve(PICTURES, rate, held, jobs) for name in POLICIES}
        yield count, found, fleet.wait_in_theory(CARD, gpus, 1, PICTURES, rate)


def in_theory(gpus: int) -> Iterator[tuple[float, dict[int, float | None]]]:
    """As `cuts`, mean seconds from arrival to end, of GPUs too many to simulate every cell: closed form."""
    top = fleet.capacity(CARD, gpus, 1, PICTURES)
    for load in LOADS:
        found: dict[int, float | None] = {}
        for size in SIZES:
            mean, _ = fleet.mean_and_spread(fleet.services(CARD, size, list(PICTURES)), PICTURES)
            fits = load * top < FULL * fleet.capacity(CARD, gpus, size, PICTURES)
            wait = fleet.wait_in_theory(CARD, gpus, size, PICTURES, load * top) if fits else 0.0
            found[size] = wait + mean if fits else None
        yield load * top, found


def with_videos(load: float) -> Iterator[tuple[str, Outcome]]:
    """Pictures and videos on one fleet: one queue over equal groups, or groups and queues apart."""
    held = switchings()["outputs kept"]
    rate = load * Fleet(VIDEO_CARD, GPUS, PER_MACHINE).capacity(VIDEOS)
    for size in (1, 4, PER_MACHINE):
        one = Fleet(VIDEO_CARD, GPUS, size)
        if rate < FULL * one.capacity(VIDEOS):
            yield f"{GPUS // size} groups of {size}, one queue by model", one.serve(VIDEOS, rate, held)
    yield _apart(rate, held)


def _apart(rate: float, switching: Switching) -> tuple[str, Outcome]:
    """Whole machines for videos, as many as keep both pools as busy; GPUs one by one for pictures."""
    video = VIDEOS[VIDEO] * fleet.service(VIDEO_CARD, PER_MACHINE, VIDEO).seconds * PER_MACHINE
    mean, _ = fleet.mean_and_spread(fleet.services(VIDEO_CARD, 1, list(PICTURES)), PICTURES)
    picture = (1 - VIDEOS[VIDEO]) * mean
    machines = GPUS // PER_MACHINE
    large = max(1, min(machines - 1, round(machines * video / (video + picture))))
    rest = GPUS - large * PER_MACHINE
    videos = fleet.hosts(VIDEO_CARD, large, PER_MACHINE, [VIDEO], switching)
    pictures = fleet.hosts(VIDEO_CARD, rest, 1, list(PICTURES), switching, first=large)
    pools = Pools({VIDEO: Affinity(videos), **dict.fromkeys(PICTURES, Affinity(pictures))})
    outcome = run(poisson(rate, VIDEOS, COUNT, SEED), [*videos, *pictures], pools)
    return f"{large} groups of {PER_MACHINE} for videos, {rest} of 1 for pictures", outcome
