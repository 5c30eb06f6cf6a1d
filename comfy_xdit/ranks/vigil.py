"""Watches the ranks of one call: hung or slow?"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from comfy_xdit.protocol.rpc import Host
from comfy_xdit.ranks import deadlines
from comfy_xdit.ranks.deadlines import Limits
from comfy_xdit.ranks.pulse import Pulse, Sign

LOOK_SECONDS = 1.0
# A look counts for at most this: while this process was itself held up nobody can say what the ranks did.
COUNTED_SECONDS = 2.0
# Seconds of waiting that one of work makes up for. Not all: ranks that wait for another one look around, and
# on a busy machine a look now and then finds them at it.
MADE_UP = 3.0


class Vigil:
    """Counts for how long ranks have not come on.

    Args:
        pids: the processes of all ranks.
        names: what to call a rank.
        limits: when it is too long.
    """

    def __init__(self, bridge: Host, pids: Sequence[int], names: Callable[[int], str], limits: Limits):
        self._bridge, self._pids, self._names, self._limits = bridge, pids, names, limits
        self._pulses: dict[int, Pulse] = {}
        self._stopped: dict[int, float] = {}
        self._last = self._sign = time.monotonic()
        self._waiting = self._working = 0.0
        self._beats = bridge.beats()
        self.longest = 0.0

    def sign(self) -> None:
        """A rank has come on."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self._sign)
        self._last = self._sign = now
        self._waiting = self._working = 0.0
        self._stopped.clear()
        self._pulses.clear()

    def due(self) -> float:
        """Seconds until the next look."""
        return max(0.0, self._last + LOOK_SECONDS - time.monotonic())

    def look(self, ranks: Collection[int]) -> str | None:
        """Why `ranks`, whose answers are missing, will not come on, or None. Call it when it is due."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, COUNTED_SECONDS), now
        beats = self._bridge.beats()
        if beats != self._beats:
            self._beats = beats
            self.sign()
            return None
        signs = {rank: self._pulses.setdefault(rank, Pulse(self._pids[rank])).look() for rank in ranks}
        for rank, sign in signs.items():
            reason = self._alone(rank, sign, passed)
            if reason is not None:
                return reason
        works = any(s is Sign.WORKING or self._bridge.device_works(r) for r, s in signs.items())
        self._waiting = waited(self._waiting, works, passed)
        self._working += passed
        return self._together(ranks)

    def _alone(self, rank: int, sign: Sign, passed: float) -> str | None:
        """What is wrong with one rank, whatever the others do."""
        self._stopped[rank] = self._stopped.get(rank, 0.0) + passed if sign is Sign.STOPPED else 0.0
        if self._stopped[rank] >= deadlines.STOPPED_SECONDS:
            return f"{self._names(rank)} is stuck: its process is stopped (SIGSTOP)"
        silent = min(self._bridge.silent_for(rank), self._working + passed)
        if silent >= deadlines.MUTE_SECONDS:
            return f"{self._names(rank)} is stuck: its interpreter has not run for {silent:.0f} s"
        return None

    def _together(self, ranks: Collection[int]) -> str | None:
        names = " and ".join(map(self._names, sorted(ranks)))
        are = "are" if len(ranks) > 1 else "is"
        if self._waiting >= self._limits.wait:
            return (
                f"{names} {are} stuck: for {self._waiting:.0f} s nobody has computed, read a file or "
                "finished anything"
            )
        if self._working >= self._limits.work:
            return f"{names} {are} stuck: at work for {self._working:.0f} s without finishing a step"
        return None


def waited(before: float, works: bool, passed: float) -> float:
    """Seconds that nobody has worked, after another look at the `passed` ones."""
    return max(0.0, before - MADE_UP * passed) if works else before + passed
