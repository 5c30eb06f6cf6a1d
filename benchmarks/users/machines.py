"""What was published of layouts over two machines, and what the planner's model says of it.

All of it is two machines of L40 on PCIe over Ethernet (100 Gbit/s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.published import FLUX_1024, FLUX_2048, FLUX_MD, PIXART, layout
from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.planner import short
from comfy_xdit.planning.prediction import predict
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import ModelShape, Request

ONE, EIGHT, SIXTEEN, TWELVE = "1 x L40", "8 x L40 PCIe", "2 x 8 L40 Ethernet", "2 x 6 L40 Ethernet"
XDIT_PAPER, COGVIDEO_MD = "arXiv 2411.01738 (summary)", "xDiT docs/performance/cogvideo.md"
FLUX_4096 = Request.picture(PUBLISHED["flux"], 4096, 4096, steps=28)
PIXART_4096 = Request(PIXART, (4096 // 16) ** 2, 0, 20, cfg=True)
COG_FRAMES = 13 * 30 * 45  # tokens of 49 frames of 720 x 480


def _cogvideo(name: str, heads: int, width: int, blocks: int, parameters: float) -> Request:
    shape = ModelShape(name, heads, width, blocks, int(parameters), cfg=True)
    return Request(shape, COG_FRAMES, 226, 50, cfg=True)


COG_2B = _cogvideo("CogVideoX-2b", 30, 1920, 30, 1.7e9)
COG_5B = _cogvideo("CogVideoX-5b", 48, 3072, 42, 5.6e9)


@dataclass(frozen=True)
class Time:
    """Predicted seconds of a run, and under which layout."""

    seconds: float
    layout: str


def under(name: str) -> Callable[[Request, str], Time]:
    """The layout of that name."""
    return lambda request, devices: Time(
        predict(layout(name), request, cluster.parse(devices)).seconds * request.steps, name
    )


def best(request: Request, devices: str) -> Time:
    """The fastest layout of all the devices, or of fewer; PipeFusion too."""
    found = planner.plan(request, cluster.parse(devices), pipefusion=True).ranked[0]
    return Time(found.expected * request.steps, short(found))


def all_of_them(request: Request, devices: str) -> Time:
    """The fastest layout that uses every device."""
    where = cluster.parse(devices)
    ranked = planner.plan(request, where, pipefusion=True).ranked
    found = next(c for c in ranked if c.layout.world_size == where.size)
    return Time(found.expected * request.steps, short(found))


@dataclass(frozen=True)
class Published:
    """A published time, or where `against` is given how many times as fast as that `value` says.

    Args:
        how: the layout over two machines; what it is compared with is the best of `against`.
    """

    name: str
    source: str
    request: Request
    devices: str
    how: Callable[[Request, str], Time]
    value: float
    against: str | None = None

    def predicted(self) -> tuple[float, Time]:
        """The same of the model: seconds or a speed-up, and what takes how long over two machines."""
        time = self.how(self.request, self.devices)
        if self.against is None:
            return time.seconds, time
        return best(self.request, self.against).seconds / time.seconds, time

    @property
    def error(self) -> float:
        """Relative error of the predicted time; of a speed-up its inverse."""
        predicted, _ = self.predicted()
        return (predicted / self.value if self.against is None else self.value / predicted) - 1


PUBLISHED_OVER_TWO = (
    Published("FLUX.1 dev 1024", FLUX_MD, FLUX_1024, SIXTEEN, under("U4xPF4"), 1.16, EIGHT),
    Published("FLUX.1 dev 2048, no gain", FLUX_MD, FLUX_2048, SIXTEEN, all_of_them, 1.0, EIGHT),
    Published("FLUX.1 dev 4096", FLUX_MD, FLUX_4096, SIXTEEN, under("U2xR2xPF4"), 1.9, EIGHT),
    Published("4096 pixels, one GPU", XDIT_PAPER, PIXART_4096, ONE, best, 245.0),
    Published("4096 pixels", XDIT_PAPER, PIXART_4096, SIXTEEN, all_of_them, 17.5),
    Published("4096 pixels", XDIT_PAPER, PIXART_4096, SIXTEEN, all_of_them, 13.29, ONE),
    Published("CogVideoX-2b, at most", COGVIDEO_MD, COG_2B, TWELVE, best, 4.29, ONE),
    Published("CogVideoX-5b, at most", COGVIDEO_MD, COG_5B, TWELVE, best, 7.75, ONE),
)
