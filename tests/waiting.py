"""Waiting for what happens in other threads and processes."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether `condition` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ends_within(pid: int, seconds: float) -> bool:
    """True when the process is gone (or a zombie) within `seconds`; waits on the process itself."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)
