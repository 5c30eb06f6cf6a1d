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

# Of a core, by one thread. A rank that waits has many that look around: one per gloo group, and
# each uses 0.0015; many together more than a thread that computes on a crowded machine.
WORKING_SHARE = 0.04
WORKING_BYTES = 64 << 10  # read or written since the last look
TICKS = os.sysconf("SC_CLK_TCK")
CHILDREN = 0  # what no thread is called


class Sign(enum.Enum):
    """What a look at a process showed."""

    WORKING = "works"
    WAITING = "waits"
    STOPPED = "is stopped"


@dataclass(frozen=True)
class _Account:
    """What a process has used by a moment (seconds of the monotonic clock)."""

    moment: float
    ticks: dict[int, int]  # by thread, and of all children
    moved: int  # bytes


class Pulse:
    """One process, looked at from time to time."""

    def __init__(self, pid: int):
        self._pid, self._last = pid, _Account(time.monotonic(), {}, 0)

    def look(self) -> Sign:
        """What it has done since the last look. Where the system does not say, it counts as working."""
        try:
            state, ticks = _state_and_ticks(self._pid)
            now = _Account(time.monotonic(), ticks, _moved_bytes(self._pid))
        except (OSError, ValueError, IndexError):  # it ends just now, or there is no /proc
            return Sign.WORKING
        last, self._last = self._last, now
        if state == "T":
            return Sign.STOPPED
        wanted = max(1, WORKING_SHARE * (now.moment - last.moment) * TICKS)
        # Children that have ended meanwhile take theirs along, so the difference may be below zero.
        busy = any(abs(now.ticks[who] - last.ticks.get(who, 0)) >= wanted for who in now.ticks)
        # R: it computes, or waits for a CPU that others use. D: for a disk.
        works = state in "RD" or busy
        return Sign.WORKING if works or now.moved - last.moved >= WORKING_BYTES else Sign.WAITING


def _state_and_ticks(pid: int) -> tuple[str, dict[int, int]]:
    """State of the main thread, and CPU time as `_Account.ticks` has it."""
    state, _, ended = _read(Path(f"/proc/{pid}/stat"))
    ticks = {CHILDREN: ended + sum(_family_ticks(pid))}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            ticks[int(task.name)] = _read(task / "stat")[1]
    return state, ticks


def _read(stat: Path) -> tuple[str, int, int]:
    """State; CPU time of a thread or a whole process; and of children of the process that have ended."""
    # The name in brackets may hold anything.
    fields = stat.read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])


def _family_ticks(pid: int) -> list[int]:
    """CPU time of every descendant that runs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile, or the kernel has no such file
            for child in map(int, (task / "children").read_text().split()):
                found += [sum(_read(Path(f"/proc/{child}/stat"))[1:]), *_family_ticks(child)]
    return found


def _moved_bytes(pid: int) -> int:
    """Bytes read and written, from memory (page cache, pipes) or a disk; 0 where it is not told."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().split()
    except PermissionError:
        return 0
    counted = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
    return sum(counted[f"{name}:"] for name in ("rchar", "wchar", "read_bytes"))
