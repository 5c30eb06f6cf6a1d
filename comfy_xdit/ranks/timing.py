"""Where the time of calls to the ranks went: compute, communication, bridge."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from comfy_xdit.protocol.messages import Result


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, or the sum of several: as the host waited, and as the slowest rank worked.

    Args:
        sent, received: bytes that crossed the bridge, seen from the host.
        communication: of the first rank's time, in exchanges with other ranks and waiting for them, as
            far as no work hides it; None where it is not measured (a GPU without XDIT_TIMINGS=1).
        reporting: of the first rank's time, in telling the host of steps.
        steps: that it told of; 0 of a call that has none.
    """

    host: float
    rank: float
    sent: int = 0
    received: int = 0
    communication: float | None = 0.0
    reporting: float = 0.0
    steps: int = 0
    calls: int = 1

    @classmethod
    def of(cls, host: float, results: Sequence[Result], sent: int, received: int, steps: int) -> Timing:
        """Of a call that all ranks have answered. The first one tells of steps, and others wait for it."""
        slowest, first = max(result.seconds for result in results), results[0]
        return cls(host, slowest, sent, received, first.communication, first.reporting, steps)

    @property
    def bridge(self) -> float:
        """What was not work on the picture: sending, waking, receiving, telling of steps."""
        return self.host - self.rank + self.reporting

    @property
    def compute(self) -> float:
        """The rest: with `communication`, where that is measured, and `bridge` it is `host`."""
        return self.rank - self.reporting - (self.communication or 0.0)

    def __add__(self, other: Timing) -> Timing:
        communication = None
        if self.communication is not None and other.communication is not None:
            communication = self.communication + other.communication
        return Timing(
            self.host + other.host, self.rank + other.rank,
            self.sent + other.sent, self.received + other.received,
            communication, self.reporting + other.reporting,
            self.steps + other.steps, self.calls + other.calls,
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """Seconds and bytes by name, and the words for them."""
        return {
            "seconds": self.host, "compute": self.compute, "communication": self.communication,
            "bridge": self.bridge, "steps": self.steps, "sent": self.sent, "received": self.received,
            "text": self.describe(),
        }  # fmt: skip

    def describe(self) -> str:
        """In words, by step, or by call where there are none."""
        count = self.steps or self.calls
        compute, bridge = (1000 * part / count for part in (self.compute, self.bridge))
        if self.communication is None:
            parts = f"compute with communication {compute:.1f} (XDIT_TIMINGS=1 tells them apart)"
        else:
            parts = f"compute {compute:.1f}, communication {1000 * self.communication / count:.1f}"
        unit = "steps" if self.steps else "calls"
        whole = f"{count} {unit} of " if count > 1 else ""
        return f"{whole}{1000 * self.host / count:.1f} ms: {parts}, bridge {bridge:.1f}"


class Ledger:
    """The calls of a process, as far as somebody asks for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[dict[str, Timing]] = []

    def note(self, kind: str, timing: Timing) -> None:
        """A call has ended."""
        with self._lock:
            for sums in self._open:
                sums[kind] = sums[kind] + timing if kind in sums else timing

    @contextmanager
    def sums(self) -> Iterator[dict[str, Timing]]:
        """The sum of the calls within, of all groups, by kind of message."""
        sums: dict[str, Timing] = {}
        with self._lock:
            self._open.append(sums)
        try:
            yield sums
        finally:
            with self._lock:
                self._open = [one for one in self._open if one is not sums]


ledger = Ledger()
