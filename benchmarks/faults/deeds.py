"""What ranks do wrong for real, beside tests/deeds.py. Each gets its end of the bridge."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.faults.plan import mark_moment
from comfy_xdit.protocol.rpc import Rank
from tests.deeds import FOREVER, address_space, fail, hang, hang_with_the_interpreter, limited

ROOM = 64 << 20  # bytes above what the process has
LATE = 2.0  # seconds by which the others are late


def read_nowhere() -> None:
    """A segmentation fault."""
    ctypes.string_at(0)


def read_what_was_cut_off() -> None:
    """A bus error: the file behind a memory map is shorter now."""
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        print(mapped[0])


def leave_in_a_collective(end: Rank) -> None:
    """Rank 1 ends while it waits for rank 0, which comes late."""
    if end.rank != 1:
        time.sleep(LATE)
        return

    def leave() -> None:
        mark_moment()
        os._exit(3)

    threading.Timer(LATE / 4, leave).start()
    dist.barrier()


def meet_nobody(end: Rank) -> None:
    """A collective that the others do not take part in."""
    dist.all_reduce(torch.zeros(3))


def spin_with_the_interpreter() -> None:
    """C code that computes for ever and holds the GIL."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def lose_the_heartbeat(end: Rank) -> None:
    """The thread that shows life ends by an exception; the rank itself would go on for ever."""
    end.ask_device = lambda: {}["missing"]
    time.sleep(FOREVER)


def want_too_much_memory() -> None:
    """More than the system gives to this process."""
    with limited(resource.RLIMIT_AS, address_space() + ROOM):
        torch.empty(ROOM).fill_(1.0)


def grow_no_file() -> None:
    """From here on no file of this process grows, its log and its segment included."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail_with_a_full_disk() -> None:
    """Raise, where nothing can be written into the log."""
    full = os.open("/dev/full", os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(full, stream)
    with contextlib.suppress(OSError):
        print("words for the log", flush=True)
    raise ValueError("with a full disk")


def raise_(kind: str) -> None:
    """An exception that no handler of a rank expects."""
    raise {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt, "ImportError": ImportError}[
        kind
    ]("of a fault")


DEEDS: dict[str, Callable[..., Any]] = {
    "signal": lambda _, number: os.kill(os.getpid(), number),
    "read nowhere": lambda _: read_nowhere(),
    "read what was cut off": lambda _: read_what_was_cut_off(),
    "abort": lambda _: os.abort(),
    "leave": lambda _, code: os._exit(code),
    "leave in a collective": leave_in_a_collective,
    "meet nobody": meet_nobody,
    "hang": lambda _: hang(),
    "hang with the interpreter": lambda _: hang_with_the_interpreter(),
    "spin with the interpreter": lambda _: spin_with_the_interpreter(),
    "lose the heartbeat": lose_the_heartbeat,
    "want too much memory": lambda _: want_too_much_memory(),
    "grow no file": lambda _: grow_no_file(),
    "fail with a full disk": lambda _: fail_with_a_full_disk(),
    "fail": lambda _, **words: fail(**words),
    "raise": lambda _, kind: raise_(kind),
}
