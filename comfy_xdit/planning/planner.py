"""Which layout to run a request under: every valid one, ranked by predicted or measured time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from statistics import geometric_mean

from comfy_xdit.planning import prediction
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.prediction import Prediction
from comfy_xdit.planning.reference import REFERENCES
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol.errors import InvalidInput, counted
from comfy_xdit.protocol.parallel import DEGREES, ParallelConfig

# Less than this is within the error of the model and of a measurement: fewer ranks are preferred.
WORTH = 0.03


@dataclass(frozen=True)
class Candidate:
    """A layout with its predicted seconds per step, corrected by what was `measured` (if it was)."""

    prediction: Prediction
    expected: float
    measured: float | None = None

    @property
    def layout(self) -> ParallelConfig:
        """The degrees."""
        return self.prediction.layout


@dataclass(frozen=True)
class Plan:
    """The pick and all candidates, fastest first; those that do not fit the memory are last."""

    pick: Candidate
    ranked: tuple[Candidate, ...]
    why: str


def candidates(
    request: Request, cluster: Cluster, pipefusion: bool = False, warmup_steps: int = 1
) -> list[ParallelConfig]:
    """Every valid layout of 1 to `cluster.size` ranks.

    Args:
        pipefusion: whether PipeFusion may be offered: XDiTSampler runs it, and its image differs
            unless `warmup_steps` are all steps. `auto` never asks for it.
    """
    shape, size = request.shape, cluster.size
    ring_runs = cluster.device.kind == "cpu" or request.dtype_bytes < 4  # no fp32 kernel gives a sum
    limits = {
        "data_parallel_degree": min(size, request.batch),
        "cfg_parallel_degree": 2 if request.cfg else 1,
        "ulysses_degree": min(size, shape.heads),
        "ring_degree": min(size, request.image_tokens) if ring_runs else 1,
        "pipefusion_degree": min(size, shape.blocks) if pipefusion else 1,
    }
    ranges = [range(1, limit + 1) for limit in limits.values()]
    layouts = (
        ParallelConfig(**dict(zip(limits, degrees, strict=True)), warmup_steps=warmup_steps)
        for degrees in product(*ranges)
    )
    return [
        layout
        for layout in layouts
        if layout.world_size <= size
        and shape.heads % layout.ulysses_degree == 0
        and layout.sequence_parallel_degree <= request.image_tokens
    ]


def plan(
    request: Request,
    cluster: Cluster,
    measured: Measured | None = None,
    pipefusion: bool = False,
    constants: prediction.Constants = prediction.EAGER,
    shard: bool = False,
) -> Plan:
    """Rank the candidates and pick one.

    Layouts whose ranks can share their weights are candidates with and without that where whole weights
    do not fit. With `shard` all are, and the pick is one that does.

    The pick fits the memory if any does, else it needs the least. Of layouts that are equally fast
    within WORTH it is that with the fewest ranks, since the others would gain nothing, and the
    smallest ring, which splits no picture of fewer tokens than ranks. Times measured on this machine
    replace the prediction of the same layout, and correct those of the others.

    Raises:
        InvalidInput: the cluster has no device, or with `shard` only one.
    """
    if cluster.size < 1 + shard:
        raise InvalidInput(
            f"a plan for {counted(cluster.size, 'device')}: it needs at least "
            + ("two to share weights; set shard_weights to false, or select more." if shard else "one.")
        )
    layouts = candidates(request, cluster, pipefusion)
    predictions = [prediction.predict(layout, request, cluster, constants) for layout in layouts]
    predictions += [
        prediction.predict(replace(one.layout, shard_weights=True), request, cluster, constants)
        for one in predictions
        if one.layout.shares_weights and (shard or not one.fits)
    ]
    known = measured or Measured()
    ranked = sorted(
        _corrected(predictions, request, cluster, known), key=lambda c: (not c.prediction.fits, c.expected)
    )
    choice = [c for c in ranked if c.layout.shard_weights or not shard]
    fitting = [c for c in choice if c.prediction.fits]
    near = [c for c in fitting if c.expected <= fitting[0].expected * (1 + WORTH)]
    pick = (
        min(near, key=lambda c: (c.layout.world_size, c.layout.ring_degree, c.expected))
        if fitting
        else min(choice, key=lambda c: (c.prediction.memory * c.layout.world_size, c.expected))
    )
    return Plan(pick, tuple(ranked), _why(pick, ranked, cluster))


def _corrected(
    predictions: list[Prediction], request: Request, cluster: Cluster, measured: Measured
) -> list[Candidate]:
    """Candidates with measured times; the others scaled by how far off the prediction was elsewhere.

    What tells most about a layout comes first: itself with another number of tokens, layouts of as
    many ranks, any layout, any layout with another number of tokens. The last matters: a device that
    is slower than its figures is slower under every layout, and one that ran must not lose by that. Where
    nothing of this model ran, it is what `bench` timed on this machine.
    """
    times, elsewhere = {}, {}
    for one in predictions:
        times[one.layout] = measured.seconds(one.layout, request, cluster)
        elsewhere[one.layout] = [
            seconds / prediction.predict(one.layout, replace(request, image_tokens=tokens), cluster).seconds
            for tokens, seconds in measured.of_layout(one.layout, request, cluster).items()
        ]
    here = {p.layout: seconds / p.seconds for p in predictions if (seconds := times[p.layout]) is not None}
    anywhere = [ratio for ratios in elsewhere.values() for ratio in ratios]
    bench = _bench(cluster, measured)
    result = []
    for one in predictions:
        alike = [ratio for layout, ratio in here.items() if layout.world_size == one.layout.world_size]
        ratios = elsewhere[one.layout] or alike or list(here.values()) or anywhere
        ratios = ratios or _of_reference(one.layout, bench) or [1.0]
        seconds = times[one.layout]
        expected = one.seconds * geometric_mean(ratios) if seconds is None else seconds
        result.append(Candidate(one, expected, seconds))
    return result


def _bench(cluster: Cluster, measured: Measured) -> dict[ParallelConfig, float]:
    """Measured over predicted of every layout that `bench` has run on this machine."""
    reference = REFERENCES[cluster.device.kind]
    ratios = {}
    for request in (reference.request(guided=False), reference.request(guided=True)):
        if not measured.knows(request, cluster):
            break
        for layout in candidates(request, cluster):
            seconds = measured.seconds(layout, request, cluster)
            if seconds is not None:
                ratios[layout] = seconds / prediction.predict(layout, request, cluster).seconds
    return ratios


def _of_reference(layout: ParallelConfig, bench: dict[ParallelConfig, float]) -> list[float]:
    """Of the same degrees, else of as many ranks, else of any: times that are far apart say little."""
    same = [ratio for other, ratio in bench.items() if other == replace(layout, shard_weights=False)]
    alike = [ratio for other, ratio in bench.items() if other.world_size == layout.world_size]
    return same or alike or list(bench.values())


def _why(pick: Candidate, ranked: list[Candidate], cluster: Cluster) -> str:
    """One or two sentences that say why this layout."""
    one = next(c for c in ranked if c.layout.world_size == 1)
    used, step = pick.layout.world_size, pick.prediction
    basis = "measured" if pick.measured is not None else "predicted"
    if not step.fits:
        return (
            f"no layout fits {cluster.device.memory / 2**30:.0f} GiB; this one needs the least, "
            f"{step.memory / 2**30:.1f} GiB per rank."
        )
    if used > 1:
        words = f"{basis} {one.expected / pick.expected:.2f} times as fast as one rank"
        words += f" ({_percent(step.communication, step)} % of a step is communication"
        words += f", {_percent(step.latency, step)} % latency)"
        if not one.prediction.fits:
            words += f"; one rank would need {one.prediction.memory / 2**30:.1f} GiB"
    else:
        words = f"{basis} {figure(1000 * pick.expected)} ms per step"
    wider = [c for c in ranked if c.layout.world_size == cluster.size and c.prediction.fits]
    if used < cluster.size and wider:
        best = min(wider, key=lambda c: c.expected)
        words += (
            f"; all {cluster.size} ranks ({best.layout.describe()}) would take "
            f"{best.expected / pick.expected:.2f} times as long"
        )
    return f"{words}."


def short(candidate: Candidate) -> str:
    """E.g. `cfg 2 x ulysses 4`."""
    return named(candidate.layout)


def named(layout: ParallelConfig) -> str:
    """The degrees that are not 1, as a person calls them."""
    names = {n: n.removesuffix("_degree").removesuffix("_parallel") for n in DEGREES}
    factors = [f"{names[n]} {getattr(layout, n)}" for n in DEGREES if getattr(layout, n) > 1]
    return (" x ".join(factors) or "one rank") + (", sharded" if layout.shard_weights else "")


def figure(value: float) -> str:
    """A positive number as a person writes it, in three digits: 0.0123, 4.56, 789, 12345."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(part: float, whole: Prediction) -> int:
    return round(100 * part / whole.seconds)
