"""What a host process has at a moment: descriptors, threads, children, memory maps, listeners, files."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

SECONDS = 3.0  # in which what is on its way must be gone
SHARED = Path("/dev/shm")


def inventory(ranks: Collection[int]) -> Counter[str]:
    """What there is of each kind; `ranks` are processes that belong here."""
    gc.collect()
    here = psutil.Process()
    found = Counter(f"descriptor {_kind(target)}" for target in _descriptors())
    found += Counter(f"thread {_kind(thread.name)}" for thread in threading.enumerate())
    found["threads of the system"] = here.num_threads()
    found["mapped segments"] = Path("/proc/self/maps").read_text().count("memfd:comfy_xdit")
    for child in here.children(recursive=True):
        if child.pid not in ranks:
            found[f"process {_name(child)}"] += 1
    for pid in (here.pid, *ranks):
        found["listening sockets"] += sum(
            c.status == psutil.CONN_LISTEN for c in psutil.Process(pid).net_connections("inet")
        )
    for folder in (Path(tempfile.gettempdir()), SHARED):
        found += Counter(f"file {_kind(entry.name)} in {folder.name}" for entry in folder.iterdir())
    return found


def left(before: Counter[str], now: Callable[[], Counter[str]]) -> list[str]:
    """What `now` has more than `before`; waits a while for it to go."""
    deadline = time.monotonic() + SECONDS
    while (more := now() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{count} more of: {what}" for what, count in more.items()]


def _descriptors() -> list[str]:
    targets = []
    for number in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # of listing them
            continue
    return targets


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[-60:] or process.status()
    except psutil.NoSuchProcess:
        return "that ends"
