"""How long ranks may go without a sign of their own work. Learned; docs/decisions/013-deadlines.md.

Three questions have three answers. How long may all ranks *wait*, with nobody who works: short. How
long may a rank *work* without a step being done: very long, since a step may be much larger than any
before. How long has the person who cancelled to wait: the longest step so far and a little more.
"""

from __future__ import annotations

from dataclasses import dataclass

STOPPED_SECONDS = 3.0  # a stopped process is a fact, whatever it was doing
WAIT_SECONDS = 15.0  # at least, while nobody works
WAIT_STEPS = 3  # times the longest step of its kind
FIRST_WAIT_SECONDS = 60.0  # in the first call of its kind, in which much happens once
MUTE_SECONDS = 60.0  # a rank that uses a CPU, but whose interpreter does not run
WORK_SECONDS = 600.0  # at least, while somebody works
WORK_STEPS = 50  # times the longest step of its kind: 20 is seen (a larger picture, a busy machine)
FIRST_WORK_SECONDS = 3600.0
CANCEL_SECONDS = 3.0  # and the longest step of its kind
FIRST_STEP_SECONDS = 10.0  # what a step is thought to take before one is seen


@dataclass(frozen=True)
class Limits:
    """Seconds in one call: `wait` while no rank works, `work` without a step, `cancel` after it was asked."""

    wait: float
    work: float
    cancel: float


class Deadlines:
    """The longest steps of a group by kind of work, first calls apart: they load, compile, warm up."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, bool], float] = {}
        self._known: set[str] = set()

    def limits(self, kind: str, guess: float | None = None) -> Limits:
        """The limits of a call of this `kind`.

        Args:
            guess: seconds that a step may take, as far as the caller knows. It can only lengthen.
        """
        first = kind not in self._known
        seen = self._longest.get((kind, first), 0.0)
        longest = max(seen, guess or 0.0)
        wait, work = (FIRST_WAIT_SECONDS, FIRST_WORK_SECONDS) if first else (WAIT_SECONDS, WORK_SECONDS)
        return Limits(
            wait=max(wait, WAIT_STEPS * longest),
            work=max(work, WORK_STEPS * longest),
            cancel=CANCEL_SECONDS + max(seen or FIRST_STEP_SECONDS, guess or 0.0),
        )

    def learn(self, kind: str, seconds: float, done: bool) -> None:
        """`seconds` was the longest step of a call of this `kind`, which came to its end if `done`."""
        key = (kind, kind not in self._known)
        self._longest[key] = max(self._longest.get(key, 0.0), seconds)
        if done:
            self._known.add(kind)

    def restart(self) -> None:
        """New processes: everything is for the first time again."""
        self._known = set()
