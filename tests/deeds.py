"""What a rank can do wrong: for tests, and for `make faults`."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import warnings

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
