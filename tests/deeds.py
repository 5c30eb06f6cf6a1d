"""What a rank can do wrong: for tests, and for `make faults`."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import torch

from comfy_xdit.protocol.errors import InvalidInput

FOREVER = 100_000
KINDS = {"ValueError": ValueError, "InvalidInput": InvalidInput, "OutOfMemory": torch.OutOfMemoryError}


def hang() -> None:
    """Without using anything, as a driver or a lock that never comes."""
    time.sleep(FOREVER)


def hang_with_the_interpreter() -> None:
    """As `hang`, in C code that holds the GIL."""
    ctypes.PyDLL(None).sleep(FOREVER)


def compute(seconds: float) -> None:
    """One long step."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def compile_for(seconds: float) -> None:
    """A child computes, as a compiler does, and the rank waits for it."""
    words = f"import time; end = time.time() + {seconds}\nwhile time.time() < end: sum(range(1000))"
    subprocess.run([sys.executable, "-c", words], check=True)


def fail(kind: str, text: str, times: int) -> None:
    """Raise."""
    raise KINDS[kind](text * times)


def be_ended(number: int) -> None:
    """By a signal, after some words of libraries."""
    warnings.warn("`torch.something` is deprecated", FutureWarning, stacklevel=1)
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """Within, this process may have no more of a resource."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def address_space() -> int:
    """Bytes this process has mapped."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[0]) * mmap.PAGESIZE


def descriptors_left(number: int) -> contextlib.AbstractContextManager[None]:
    """Within, this process may open so many files and no more."""
    free = (at for at in itertools.count() if not os.path.lexists(f"/proc/self/fd/{at}"))
    return limited(resource.RLIMIT_NOFILE, next(itertools.islice(free, number, None)))
