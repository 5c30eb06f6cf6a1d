"""What `bench` times on a machine, and how its times stand beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from comfy_xdit.planning.auto import machine
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.planner import figure, named
from comfy_xdit.planning.prediction import predict
from comfy_xdit.planning.reference import REFERENCES, Reference
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices

LAYOUT, TIME, RATIO = 28, 12, 10  # characters of a column


@dataclass(frozen=True)
class Timed:
    """A layout, whether its picture was guided, and the least seconds of a step."""

    layout: ParallelConfig
    guided: bool
    seconds: float

    @property
    def name(self) -> str:
        """For the table."""
        return named(self.layout) + (" (cfg > 1)" if self.guided else "")

    def describe(self) -> str:
        """In words."""
        return f"{self.name}: {_ms(self.seconds)} per step"


def here() -> tuple[Cluster, Reference]:
    """This machine, and the model that is timed on it."""
    where = machine(available_devices())
    return where, REFERENCES[where.device.kind]


def layouts(where: Cluster, reference: Reference) -> Iterator[tuple[ParallelConfig, bool]]:
    """What is timed, and whether with guidance: what is compared with comes first."""
    yield ParallelConfig(), False
    counts = sorted({min(2, where.size), where.size} - {1})
    for count in counts:
        if reference.heads % count == 0:
            yield ParallelConfig(ulysses_degree=count), False
        yield ParallelConfig(ring_degree=count), False
    if counts:
        yield ParallelConfig(), True
        yield ParallelConfig(cfg_parallel_degree=2), True


def speedups(timed: list[Timed]) -> dict[str, float]:
    """By name, over one rank with the same request."""
    one = {t.guided: t.seconds for t in timed if t.layout.world_size == 1}
    return {t.name: one[t.guided] / t.seconds for t in timed if t.layout.world_size > 1 and t.guided in one}


def table(timed: list[Timed], reference: Reference, where: Cluster) -> Iterator[str]:
    """Measured beside predicted, as the planner would have it without these times."""
    found = speedups(timed)
    yield f"{'layout':<{LAYOUT}}{'measured':>{TIME}}{'predicted':>{TIME}}{'speed-up':>{RATIO}}"
    for one in timed:
        predicted = predict(one.layout, reference.request(one.guided), where).seconds
        ratio = f"{found.get(one.name, 1.0):.2f}"
        yield f"{one.name:<{LAYOUT}}{_ms(one.seconds):>{TIME}}{_ms(predicted):>{TIME}}{ratio:>{RATIO}}"


def _ms(seconds: float) -> str:
    return f"{figure(1000 * seconds)} ms"
