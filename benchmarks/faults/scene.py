"""Where faults happen: two ranks, their jobs, and the measure of how busy the machine is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import plan
from benchmarks.faults.jobs import EXPECTED, Jobs, equal
from benchmarks.faults.leftovers import inventory, left
from comfy_xdit.protocol.errors import XDiTError
from comfy_xdit.protocol.messages import Progress
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.group import WorkerGroup

TWO = ParallelConfig(ulysses_degree=2)
RUNS = 5  # of a loop, of which the fastest is what it costs on an idle machine

# Seconds from a fault to what the caller learns.
DEATH, EXCEPTION, STOP = 2.0, 4.0, 8.0
HANG = 3.0  # and the deadline of the kind


def hang_bound(deadline: float) -> float:
    """Of a hang that a deadline ends."""
    return deadline + HANG


@dataclass(frozen=True)
class Seen:
    """What came of a fault: the error, or None, and the seconds until it was there."""

    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Args:
        bound: seconds until the caller must know, on an idle machine.
        says: a pattern that is in the error; None where the run must go on and be right.
        inject: lets it happen and returns what the caller sees.
        keeps: the ranks must stay as they are.
    """

    kind: str
    name: str
    bound: float
    says: str | None
    inject: Callable[[Scene], Seen]
    keeps: bool = False


class Scene:
    """Two ranks and their jobs."""

    def __init__(self, folder: Path):
        self.jobs = Jobs(folder)
        self.group = WorkerGroup(TWO, program="benchmarks.faults.rank")
        self.expected = self.jobs.draw(self.group)
        torch.save(self.expected, folder / EXPECTED)
        self._idle = min(self._loop_seconds() for _ in range(RUNS))
        self.slowness = 1.0

    def close(self) -> None:
        """End all processes."""
        self.group.close()

    # ------------------------------------------------------------------ before and after a fault

    def next_job(self) -> list[str]:
        """What is wrong with a job of these ranks, or new ones; measures how busy the machine is, too."""
        try:
            right = equal(self.jobs.draw(self.group), self.expected)
            self.slowness = max(1.0, self._loop_seconds() / self._idle)
        except XDiTError as error:
            self.group.close()
            return [f"the next job fails: {error}"]
        return [] if right else ["the next job draws another picture"]

    def inventory(self) -> Counter[str]:
        """What this process has."""
        return inventory(self.group.pids)

    def left(self, before: Counter[str]) -> list[str]:
        """What it has more than `before`."""
        return left(before, self.inventory)

    def _loop_seconds(self) -> float:
        began = time.monotonic()
        self.group.call(self.jobs.sample())
        return time.monotonic() - began

    # ------------------------------------------------------------------ faults

    def see(self, call: Callable[[], Any]) -> Seen:
        """What `call` ends with; its seconds count from the moment that was marked in it."""
        began = time.monotonic()
        error: BaseException | None = None
        try:
            call()
        except (Exception, KeyboardInterrupt) as raised:
            # The frames of what raised it, and of its cause, hold bridges and whole pictures.
            error = raised.with_traceback(None)
            error.__cause__ = error.__context__ = None
        return Seen(error, time.monotonic() - (plan.moment() or began))

    def see_planned(self, what: plan.Plan, interrupted: Callable[[], bool] | None = None) -> Seen:
        """What a call ends with in which a rank does what is planned."""
        with plan.armed(what):
            if what.at == plan.CLOSE:
                return self.see(self.group.close)
            if what.at == plan.START:
                self.group.close()
                return self.see(lambda: self.jobs.draw(self.group))
            return self.see(lambda: self.jobs.do(self.group, what.at, interrupted=interrupted))

    def see_in_mid_run(self, deed: Callable[[], None]) -> Seen:
        """What a loop ends with in which the host does `deed` after some steps."""
        plan.forget_moment()

        def after_steps(progress: Progress) -> None:
            if progress.step == 5:
                plan.mark_moment()
                deed()

        return self.see(lambda: self.jobs.do(self.group, "Sample", after_steps))

    def see_a_job(self, deed: Callable[[], None]) -> Seen:
        """What a job ends with before which the host does `deed`; a wrong answer is an error, too."""
        plan.forget_moment()
        deed()

        def draw() -> None:
            if not equal(self.jobs.draw(self.group), self.expected):
                raise AssertionError("the picture is another one")

        return self.see(draw)


def is_ours(error: BaseException) -> bool:
    """Whether an error is one that the pack raises on purpose."""
    return isinstance(error, XDiTError)
