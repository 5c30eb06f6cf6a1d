"""One ComfyUI with one group of ranks: what it has loaded, and what it costs to change that.

The rules are those of the pack. Models stand in the ranks side by side while there is room, the least
recently used goes first (worker/store.py). A model whose loader output is dropped, which ComfyUI does when
the next graph does not use it, is let go a while later (comfy_xdit/ranks/holders.py). Another layout on the
same GPUs ends the ranks and all that is loaded (comfy_xdit/ranks/registry.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LINGER_SECONDS = 60.0  # of comfy_xdit/ranks/holders.py, to which a test holds it


@dataclass(frozen=True)
class Service:
    """What a kind of request takes on a host.

    Args:
        seconds: with everything loaded.
        layout: of the ranks; kinds with equal ones share them.
        weights: bytes that each rank keeps of the model.
        model: what is loaded; kinds of one model share it.
    """

    seconds: float
    layout: str = ""
    weights: float = 0.0
    model: str = ""


@dataclass(frozen=True)
class Switching:
    """What a change costs.

    Args:
        rate: bytes per second at which each rank of a group reads weights, side by side.
        restart: seconds from one layout's ranks to another's.
        keeps: whether another layout keeps processes and weights.
        linger: seconds until the ranks let go of a model whose graph is no longer the host's last.
    """

    rate: float
    restart: float = 0.0
    keeps: bool = False
    linger: float = LINGER_SECONDS


FREE = Switching(rate=math.inf)


class Host:
    """Serves one request at a time, as ComfyUI's queue does.

    Args:
        number: names it.
        services: by kind.
        room: bytes of weights that fit each of its GPUs.
    """

    def __init__(self, number: int, services: Mapping[str, Service], room: float, switching: Switching):
        self.number, self.services, self._room, self._switching = number, services, room, switching
        self._layout: str | None = None
        self._loaded: dict[str, tuple[float, float]] = {}  # model -> bytes, when to let go; last used is last
        self._held = ""

    def ready(self, kind: str, now: float) -> bool:
        """Whether the kind's model is there, under ranks of the kind's layout."""
        service = self.services[kind]
        _, due = self._loaded.get(service.model, (0.0, now))
        return due > now and (self._switching.keeps or service.layout == self._layout)

    def prepare(self, kind: str, now: float) -> float:
        """Have the kind's model there from `now` on. Returns the seconds until it is."""
        service, switching, seconds = self.services[kind], self._switching, 0.0
        if self._held and self._held != service.model:  # the graph before is dropped
            self._loaded[self._held] = (self._loaded[self._held][0], now + switching.linger)
        self._loaded = {m: (size, due) for m, (size, due) in self._loaded.items() if due > now}
        if service.layout != self._layout:
            seconds += switching.restart
            self._layout = service.layout
            if not switching.keeps:
                self._loaded = {}
        if self._loaded.pop(service.model, None) is None:
            self._make_room(service.weights)
            seconds += service.weights / switching.rate
        self._loaded[service.model] = (service.weights, math.inf)
        self._held = service.model
        return seconds

    def _make_room(self, needed: float) -> None:
        while self._loaded and sum(size for size, _ in self._loaded.values()) + needed > self._room:
            del self._loaded[next(iter(self._loaded))]
