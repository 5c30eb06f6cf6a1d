"""`bench`: what one rank and several do on this machine, in a minute, kept for the planner."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from comfy_xdit import bench_model
from comfy_xdit.chart import bars
from comfy_xdit.planning.auto import machine
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.planner import figure, named
from comfy_xdit.planning.prediction import predict
from comfy_xdit.planning.reference import REFERENCES, Reference
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import running_groups, worker_group
from comfy_xdit.remote import RemoteModel

LOOPS = 3  # of a layout: the first warms up and does not count
CFG = 3.0
PLOT = "bench.png"


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


def run(output: Path, budget: float) -> None:
    """Time the layouts, print a table, write a plot; the times are remembered on the way.

    Args:
        output: folder of the plot; it is there.
        budget: seconds after which no further layout is begun.
    """
    where = machine(available_devices())
    reference = REFERENCES[where.device.kind]
    plain, _ = reference.requests()
    print(f"{where.describe()}; random weights, {reference.shape.parameters / 1e6:.0f} million parameters")
    print(f"{plain.image_tokens} + {plain.text_tokens} tokens, {8 * plain.dtype_bytes} bits; about a minute")
    began, timed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.safetensors"
        bench_model.write(reference, file)
        for layout, guided in layouts(where, reference):
            if timed and time.monotonic() - began > budget:
                print(f"{named(layout)} is left out: the {budget:g} s are over (more: --seconds)")
                continue
            try:
                timed.append(Timed(layout, guided, _seconds(file, layout, guided, reference)))
            finally:
                for group in running_groups():
                    group.close()
            print(f"{timed[-1].name}: {figure(1000 * timed[-1].seconds)} ms per step", flush=True)
    print(*table(timed, reference, where), sep="\n")
    found = speedups(timed)
    if found:
        bars("speed-up over one rank, measured", found, output / PLOT, line=1.0)
        print(f"wrote {output / PLOT}")
    print("These times now correct the plans for this machine: strategy auto, and the command plan.")


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
    yield f"{'layout':<28}{'measured':>12}{'predicted':>12}{'speed-up':>10}"
    for one in timed:
        request = _request(reference, one.guided)
        predicted = predict(one.layout, request, where).seconds
        ratio = f"{found[one.name]:.2f}" if one.name in found else "1.00"
        yield f"{one.name:<28}{_ms(one.seconds):>12}{_ms(predicted):>12}{ratio:>10}"


def _ms(seconds: float) -> str:
    return f"{figure(1000 * seconds)} ms"


def _request(reference: Reference, guided: bool) -> Request:
    return next(request for request in reference.requests() if request.cfg == guided)


def _seconds(file: Path, layout: ParallelConfig, guided: bool, reference: Reference) -> float:
    """The least of some loops. RemoteModel remembers each but the first (planning/calls.py)."""
    layout = replace(layout, devices=available_devices()[: layout.world_size])
    remote = RemoteModel(ModelSpec.of(file, "transformer"), layout)
    latent = remote.described().latent
    side = reference.side // latent.compression
    noise = torch.randn(1, latent.channels, side, side, generator=torch.Generator().manual_seed(2))
    sigmas = torch.linspace(1.0, 0.0, reference.steps + 1)
    prompt = bench_model.prompt()
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(noise), noise, CFG if guided else 1.0,
        prompt, prompt if guided else None, sigmas,
    )  # fmt: skip
    times = []
    for _ in range(LOOPS):
        remote.sample(request)
        times.append(worker_group(layout).timings[Sample.__name__].rank / reference.steps)
    return min(times[1:])
