"""Which groups of ranks this process has: one per layout, closed at exit."""

from __future__ import annotations

import atexit
import threading

from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.ranks.group import WorkerGroup
from comfy_xdit.ranks.holders import Holders

_groups: dict[ParallelConfig, WorkerGroup] = {}
_groups_lock = threading.Lock()


def worker_group(parallel: ParallelConfig) -> WorkerGroup:
    """The group of this layout.

    Another one is closed first if it would share a GPU with it, whose memory two groups would fill,
    or if nobody holds a model in it any more.
    """
    parallel = parallel.check(available_devices())
    with _groups_lock:
        for other in [key for key in _groups if key != parallel]:
            if _share_a_gpu(other, parallel) or not holders.is_held(other):
                _groups.pop(other).close()
        if parallel not in _groups:
            _groups[parallel] = WorkerGroup(parallel)
        return _groups[parallel]


def _share_a_gpu(one: ParallelConfig, other: ParallelConfig) -> bool:
    return any(device != "cpu" for device in set(one.devices) & set(other.devices))


def running_groups() -> list[WorkerGroup]:
    """Every group of this process that has been asked for and not closed."""
    return list(_groups.values())


holders = Holders(running_groups)


@atexit.register
def _close_all() -> None:
    while _groups:
        _groups.popitem()[1].close()
