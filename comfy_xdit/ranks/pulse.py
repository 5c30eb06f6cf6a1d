"""Whether a process works, waits or is stopped: what the operating system says of it (/proc).

A rank cannot tell this of itself: a thread beside the work says only that the interpreter runs. Slow is
not hung: a slow rank uses a CPU or waits for one, reads a file, or has children (compilers) that do.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from dataclasses import dataclass
from pathlib import Path

WORKING_SHARE = 0.02  # of a core; a rank that waits uses less than 0.002 for its threads that watch
WORKING_BYTES = 64 << 10  # read or written since the last look
TICKS = os.sysconf("SC_CLK_TCK")


class Sign(enum.Enum):
    """What a look at a process showed."""

    WORKING = "works"
    WAITING = "waits"
    STOPPED = "is stopped"


@dataclass(frozen=True)
class _Account:
    """What a process has used by a moment (seconds of the monotonic clock)."""

    moment: float
    ticks: int
    moved: int  # bytes


class Pulse:
    """One process, looked at from time to time."""

    def __init__(self, pid: int):
        self._pid, self._last = pid, _Account(time.monotonic(), 0, 0)

    def look(self) -> Sign:
        """What it has done since the last look. Where the system does not say, it counts as working."""
        try:
            state, ticks = _state_and_ticks(self._pid)
            now = _Account(time.monotonic(), ticks + sum(_family_ticks(self._pid)), _moved_bytes(self._pid))
        except (OSError, ValueError, IndexError):  # it ends just now, or there is no /proc
            return Sign.WORKING
        last, self._last = self._last, now
        if state == "T":
            return Sign.STOPPED
        wanted = WORKING_SHARE * (now.moment - last.moment) * TICKS
        # R: it computes, or waits for a CPU that others use. D: for a disk.
        works = state in "RD" or abs(now.ticks - last.ticks) >= max(1, wanted)
        return Sign.WORKING if works or now.moved - last.moved >= WORKING_BYTES else Sign.WAITING


def _state_and_ticks(pid: int) -> tuple[str, int]:
    """State of the main thread; CPU time of all threads, and of children that have ended."""
    # The name in brackets may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], sum(map(int, fields[11:15]))


def _family_ticks(pid: int) -> list[int]:
    """CPU time of every descendant that runs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile, or the kernel has no such file
            for child in map(int, (task / "children").read_text().split()):
                found += [_state_and_ticks(child)[1], *_family_ticks(child)]
    return found


def _moved_bytes(pid: int) -> int:
    """Bytes read and written, from memory (page cache, pipes) or a disk; 0 where it is not told."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().split()
    except PermissionError:
        return 0
    counted = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
    return sum(counted[f"{name}:"] for name in ("rchar", "wchar", "read_bytes"))
