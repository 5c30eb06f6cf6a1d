"""Where the time of a command goes in this rank: counted where it goes, at about a microsecond each time."""

from __future__ import annotations

import os
import time

import torch

TIMINGS = "XDIT_TIMINGS"  # environment: 1 measures on a GPU too, with events


class Clock:
    """Seconds of one kind of work within a command. Enter it around the work; what is within counts once.

    What is given to a GPU returns at once, and the CPU's clock says nothing of it. There two events are
    recorded each time, if that is asked for, and say for how long the GPU waited.
    """

    def __init__(self) -> None:
        self._depth, self._began, self._seconds = 0, 0.0, 0.0
        self._device = torch.device("cpu")
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def restart(self, device: torch.device) -> None:
        """A command begins whose work is done by `device`."""
        self._depth, self._seconds, self._device = 0, 0.0, device
        self._events.clear()

    def read(self) -> float | None:
        """Seconds since `restart`; None where nobody asked for events."""
        if self._device.type == "cpu":
            return self._seconds
        if not self._records():
            return None
        torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in self._events) / 1000

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if self._device.type == "cpu":
            self._began = time.perf_counter()
        elif self._records():
            self._events.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            self._events[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._device.type == "cpu":
            self._seconds += time.perf_counter() - self._began
        elif self._records():
            self._events[-1][1].record()

    @staticmethod
    def _records() -> bool:
        return os.environ.get(TIMINGS) == "1"


communication = Clock()  # exchanges with other ranks, and waiting for them, as far as no work hides it
reporting = Clock()  # words to the host in the middle of a command
