"""What requests take on groups of GPUs, from the planner; and G GPUs cut into such groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.published import HUNYUAN_720, HUNYUAN_VAE
from benchmarks.users import theory
from benchmarks.users.hosts import Host, Service, Switching
from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import Request

STEPS = 28
PER_MACHINE = 8  # GPUs
SIZES = (1, 2, 4, 8)  # GPUs of a group


@dataclass(frozen=True)
class Kind:
    """What people ask for.

    Args:
        model: which file; a fine-tune is another file of the same shape.
        outside: seconds that the ranks do not share.
    """

    model: str
    request: Request
    outside: float = 0.0


def _picture(model: str, shape: str) -> Kind:
    return Kind(model, Request.picture(PUBLISHED[shape], steps=STEPS))


KINDS = {
    "FLUX.1": _picture("FLUX.1", "flux"),
    "a fine-tune of FLUX.1": _picture("a fine-tune of FLUX.1", "flux"),
    "SD3.5 large": _picture("SD3.5 large", "sd3.5-large"),
    "SD3.5 medium": _picture("SD3.5 medium", "sd3.5-medium"),
    "HunyuanVideo 720p": Kind("HunyuanVideo", HUNYUAN_720, HUNYUAN_VAE),
}
PICTURES = {"FLUX.1": 0.40, "a fine-tune of FLUX.1": 0.20, "SD3.5 large": 0.25, "SD3.5 medium": 0.15}
VIDEO = "HunyuanVideo 720p"
VIDEOS = {**{name: 0.98 * share for name, share in PICTURES.items()}, VIDEO: 0.02}


def group(gpu: str, size: int) -> Cluster:
    """`size` GPUs ("L40 PCIe") of one machine, or of whole machines over Ethernet."""
    if size <= PER_MACHINE:
        return cluster.parse(f"{size} x {gpu}")
    return cluster.parse(f"{size // PER_MACHINE} x {PER_MACHINE} {gpu} Ethernet")


@cache
def service(gpu: str, size: int, kind: str) -> Service:
    """What `auto` makes of a kind on a group: it may leave GPUs idle that would not make it faster.

    Raises:
        ValueError: the model fits no layout there.
    """
    what, where = KINDS[kind], group(gpu, size)
    pick = planner.plan(what.request, where).pick
    if not pick.prediction.fits:
        raise ValueError(f"{kind} does not fit {where.describe()}")
    layout, request = pick.layout, what.request
    sharers = layout.world_size if layout.shard_weights else 1
    weights = request.shape.parameters * request.dtype_bytes / sharers
    seconds = pick.expected * request.steps + what.outside
    return Service(seconds, planner.short(pick), weights, what.model)


def services(gpu: str, size: int, kinds: Sequence[str]) -> dict[str, Service]:
    """Of every kind."""
    return {kind: service(gpu, size, kind) for kind in kinds}


def hosts(
    gpu: str, count: int, size: int, kinds: Sequence[str], switching: Switching, first: int = 0
) -> list[Host]:
    """`count` hosts with a group of `size` GPUs each; their numbers begin with `first`."""
    room = group(gpu, size).device.memory
    table = services(gpu, size, kinds)
    return [Host(first + i, table, room, switching) for i in range(count)]


def mean_and_spread(table: Mapping[str, Service], shares: Mapping[str, float]) -> tuple[float, float]:
    """Mean seconds of service, and the squared coefficient of variation."""
    total = sum(shares.values())
    mean = sum(share * table[kind].seconds for kind, share in shares.items()) / total
    square = sum(share * table[kind].seconds ** 2 for kind, share in shares.items()) / total
    return mean, square / mean**2 - 1


def capacity(gpu: str, gpus: int, size: int, shares: Mapping[str, float]) -> float:
    """Requests per second that the groups serve at most, if they never load anything."""
    mean, _ = mean_and_spread(services(gpu, size, list(shares)), shares)
    return gpus // size / mean


def wait_in_theory(gpu: str, gpus: int, size: int, shares: Mapping[str, float], rate: float) -> float:
    """Mean seconds in one queue for all groups that never load anything: an approximation, no simulation."""
    mean, spread = mean_and_spread(services(gpu, size, list(shares)), shares)
    return theory.mgc(rate, mean, spread, gpus // size)
