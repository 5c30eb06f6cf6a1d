"""Times that were measured on this machine, remembered between runs.

One JSON file: machine -> model -> "layout, tokens, rows ..." -> the least seconds per step. They
choose among layouts and never change what a layout computes.
"""

from __future__ import annotations

import threading
from typing import Any

from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.parallel import DEGREES, ParallelConfig, rank_threads

NAME = "measured.json"
BETTER = 0.95  # a time replaces the remembered one below this share of it: few writes, no drift
_seen: dict[tuple[str, ...], float] = {}  # what this process has written or found, by folder and key
_lock = threading.Lock()


class Measured:
    """Seconds per step by machine, model and layout."""

    def __init__(self, times: dict[str, dict[str, dict[str, float]]] | None = None):
        self._times = times or {}

    @classmethod
    def load(cls) -> Measured:
        """What is remembered. A file that cannot be read counts as empty, with a warning."""
        return cls(remembered.read(NAME, _check))

    def seconds(self, layout: ParallelConfig, request: Request, cluster: Cluster) -> float | None:
        """The least seconds per step of this layout and request on this machine; None if never run."""
        return self._of(request, cluster).get(_entry(layout, request))

    def knows(self, request: Request, cluster: Cluster) -> bool:
        """Whether any time of this model on this machine is there."""
        return bool(self._of(request, cluster))

    def of_layout(self, layout: ParallelConfig, request: Request, cluster: Cluster) -> dict[int, float]:
        """Seconds by image tokens, of requests that differ from `request` in those alone."""
        found = {}
        before, after = _entry(layout, request).split(f" {request.image_tokens} tokens ")
        for entry, value in self._of(request, cluster).items():
            if entry.startswith(f"{before} ") and entry.endswith(f" {after}"):
                tokens = entry.removeprefix(before).removesuffix(after).split()
                found[int(tokens[0])] = value
        return found

    def with_time(
        self, layout: ParallelConfig, request: Request, cluster: Cluster, seconds: float
    ) -> Measured:
        """The same with one more time, e.g. of a table; nothing is written."""
        times = {machine: {m: dict(v) for m, v in models.items()} for machine, models in self._times.items()}
        models = times.setdefault(_machine(cluster), {})
        models.setdefault(request.shape.key, {})[_entry(layout, request)] = seconds
        return Measured(times)

    def _of(self, request: Request, cluster: Cluster) -> dict[str, float]:
        return self._times.get(_machine(cluster), {}).get(request.shape.key, {})


def remember(layout: ParallelConfig, request: Request, cluster: Cluster, seconds: float) -> None:
    """Keep the time of one step, if it is the first or clearly less than the one that is kept."""
    machine, model, entry = _machine(cluster), request.shape.key, _entry(layout, request)
    seen = (str(remembered.cache_folder()), machine, model, entry)

    def change(times: dict[str, Any]) -> bool:
        kept = times.setdefault(machine, {}).setdefault(model, {})
        better = seconds < BETTER * kept.get(entry, float("inf"))
        if better:
            kept[entry] = seconds
        _seen[seen] = kept[entry]
        return better

    with _lock:
        if seconds < BETTER * _seen.get(seen, float("inf")):
            _seen[seen] = seconds
            remembered.update(NAME, _check, change)


def _check(times: Any) -> None:
    """Raise ValueError for what is not machine -> model -> entry -> seconds."""
    try:
        for models in times.values():
            for entries in models.values():
                for entry, seconds in entries.items():
                    int(entry.split()[1])
                    if isinstance(seconds, bool) or not 0 < float(seconds) < 1e6:
                        raise ValueError(f"{entry!r} takes {seconds!r} seconds")
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"not a table of times ({error})") from error


def _machine(cluster: Cluster) -> str:
    """Devices of a kind run a layout alike, however many there are; CPU ranks by their threads."""
    if cluster.device.kind == "cpu":
        return f"CPU, {rank_threads(1)} and {rank_threads(2)} threads"
    return cluster.device.name


def _entry(layout: ParallelConfig, request: Request) -> str:
    degrees = ",".join(str(getattr(layout, name)) for name in DEGREES)
    warmup = f" warmup {layout.warmup_steps} of {request.steps}" if layout.pipefusion_degree > 1 else ""
    kind = f"{request.rows} rows {request.dtype_bytes} bytes{warmup}"
    kind += " sharded" if layout.shard_weights else ""
    # Without the text's length, which differs from prompt to prompt and hardly counts.
    return f"{degrees} {request.image_tokens} tokens {kind}"
