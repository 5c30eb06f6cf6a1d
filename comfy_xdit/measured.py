"""Times that were measured on this machine, remembered between runs.

One JSON file in the user's cache folder: machine -> model -> "layout, tokens, rows ..." -> the
least seconds per step. They choose among layouts and never change what a layout computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.cluster import Cluster
from comfy_xdit.environment import rank_threads
from comfy_xdit.parallel import DEGREES, ParallelConfig
from comfy_xdit.request import Request

FOLDER = "XDIT_CACHE_DIR"  # environment: where the file is, instead of the user's cache folder
NAME = "measured.json"
BETTER = 0.95  # a time replaces the remembered one below this share of it: few writes, no drift
_log = logging.getLogger(__name__)
_damaged: set[str] = set()  # said once per file and process
_seen: dict[tuple[str, ...], float] = {}  # what this process has written or found, by file and key
_lock = threading.Lock()


def cache_folder() -> Path:
    """Where this user's measured times are: XDIT_CACHE_DIR, or comfy_xdit in the cache folder."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfy_xdit"


class Measured:
    """Seconds per step by machine, model and layout."""

    def __init__(self, times: dict[str, dict[str, dict[str, float]]] | None = None):
        self._times = times or {}

    @classmethod
    def load(cls) -> Measured:
        """What is remembered. A file that cannot be read counts as empty, with a warning."""
        return cls(_read(cache_folder() / NAME))

    def seconds(self, layout: ParallelConfig, request: Request, cluster: Cluster) -> float | None:
        """The least seconds per step of this layout and request on this machine; None if never run."""
        return self._of(request, cluster).get(_entry(layout, request))

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
    """Keep the time of one step, if it is the first or clearly less than the one that is kept.

    The file is read, changed and replaced under a lock: several processes lose nothing.
    """
    file = cache_folder() / NAME
    key = (_machine(cluster), request.shape.key, _entry(layout, request))
    seen = (str(file), *key)
    with _lock:
        if seconds >= BETTER * _seen.get(seen, float("inf")):
            return
        try:
            _seen[seen] = _merge(file, key, seconds)
        except OSError as error:
            _seen[seen] = seconds
            _log.warning("comfy_xdit: measured times are not remembered: %s", error)


def _merge(file: Path, key: tuple[str, str, str], seconds: float) -> float:
    """Write `seconds` unless the file holds about as little; returns what it then holds."""
    machine, model, entry = key
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        times = _read(file)
        kept = times.setdefault(machine, {}).setdefault(model, {})
        if seconds < BETTER * kept.get(entry, float("inf")):
            kept[entry] = seconds
            _replace(file, times)
        return kept[entry]


def _replace(file: Path, times: dict[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            json.dump(times, opened, indent=1, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _read(file: Path) -> dict[str, Any]:
    try:
        times = json.loads(file.read_text(encoding="utf-8"))
        _check(times)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if str(file) not in _damaged:
            _damaged.add(str(file))
            _log.warning("comfy_xdit: %s cannot be read and counts as empty: %s", file, error)
        return {}
    return times


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


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "w", encoding="ascii") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield  # closing the file lets go


def _machine(cluster: Cluster) -> str:
    """Devices of a kind run a layout alike, however many there are; CPU ranks by their threads."""
    if cluster.device.kind == "cpu":
        return f"CPU, {rank_threads(1)} and {rank_threads(2)} threads"
    return cluster.device.name


def _entry(layout: ParallelConfig, request: Request) -> str:
    degrees = ",".join(str(getattr(layout, name)) for name in DEGREES)
    warmup = f" warmup {layout.warmup_steps} of {request.steps}" if layout.pipefusion_degree > 1 else ""
    # Without the text's length, which differs from prompt to prompt and hardly counts.
    return f"{degrees} {request.image_tokens} tokens {request.rows} rows {request.dtype_bytes} bytes{warmup}"
