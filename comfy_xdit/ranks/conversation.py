"""One call: what the ranks say until all have answered, or are found dead, hung or in disagreement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from comfy_xdit.protocol.errors import Interrupted, WorkerDied
from comfy_xdit.protocol.messages import Failure, Progress, Result
from comfy_xdit.protocol.rpc import Event, Host
from comfy_xdit.ranks.deadlines import Limits
from comfy_xdit.ranks.processes import NEXT, RankProcesses
from comfy_xdit.ranks.vigil import Vigil

GRACE_SECONDS = 3.0  # between the first failure and the last answer: the others hang in a collective
POLL_SECONDS = 0.05  # how often the host's interrupt flag, which cannot be waited on, is looked at
CLOSED = "the ranks were ended in mid-call: the program ends, or another layout needs their devices"


class Unanswered(Interrupted):
    """The person has cancelled, and the ranks did not stop in time: they must be ended."""


class Conversation:
    """Collects the answers of `ranks` to `job`.

    Args:
        kind: what was asked for, in one word.
        limits: how long they may take.
    """

    def __init__(
        self,
        bridge: Host,
        processes: RankProcesses,
        job: int,
        ranks: Sequence[int],
        kind: str,
        limits: Limits,
    ):
        self._bridge, self._processes, self._job, self.ranks = bridge, processes, job, list(ranks)
        self._kind, self._limits = kind, limits
        self._vigil = Vigil(bridge, processes.pids, processes.name, limits)
        self._step: Progress | None = None
        self._cancelled = self._grace = float("inf")  # when each is over
        self.replies: dict[int, Any] = {}
        self.received = 0  # bytes

    @property
    def is_done(self) -> bool:
        """Whether all ranks have answered with a result."""
        return len(self.replies) == len(self.ranks) and all(
            isinstance(reply, Result) for reply in self.replies.values()
        )

    @property
    def steps(self) -> int:
        """How many steps the ranks told of."""
        return 0 if self._step is None else self._step.step

    @property
    def longest(self) -> float:
        """Seconds of the longest step so far."""
        return self._vigil.longest

    def collect(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> dict[int, Any]:
        """The last message of every rank: all of them, or fewer when one failed and others hang.

        Raises:
            WorkerDied: a rank ended or hangs, the bridge failed, or the group is being closed.
            Unanswered: `interrupted` returned True, and the ranks did not stop in time.
        """
        while len(self.replies) < len(self.ranks):
            if interrupted is not None and self._cancelled == float("inf") and interrupted():
                self.cancel()
            asking = interrupted is not None and self._cancelled == float("inf")
            event = self._next(POLL_SECONDS if asking else self._vigil.due())
            if event is not None and event.job == self._job:
                self._take(event, on_progress)
            if time.monotonic() >= self._grace:
                break
            self._check()
        return self.replies

    def cancel(self) -> None:
        """Ask the ranks to stop at the next step; they have so long, from the first time on."""
        try:
            self._bridge.interrupt(self._job)
        except RuntimeError as error:  # the store
            raise WorkerDied(f"the bridge to the ranks failed {self._doing()}: {error}. {NEXT}") from error
        self._cancelled = min(self._cancelled, time.monotonic() + self._limits.cancel)

    def _next(self, seconds: float) -> Event | None:
        """The next event, or None when none came in time. Raises WorkerDied."""
        over = min(self._grace, self._cancelled) - time.monotonic()
        event = self._bridge.wait(max(0.0, min(seconds, over)))
        if event is None:
            return None
        if event.closed:
            raise WorkerDied(f"{CLOSED}. {NEXT}")
        if event.fault is not None:
            kind = "" if isinstance(event.fault, WorkerDied) else f"{type(event.fault).__name__}: "
            raise WorkerDied(
                f"the bridge to the ranks failed {self._doing()}: {kind}{event.fault}. {NEXT}\n"
                f"{self._processes.tails()}"
            )
        if event.exit_code is not None:
            raise WorkerDied(self._processes.obituary(event.rank, event.exit_code, self._doing()))
        return event

    def _take(self, event: Event, on_progress: Callable[[Progress], None] | None) -> None:
        self.received += event.nbytes
        self._vigil.sign()
        if isinstance(event.message, Progress):
            self._step = event.message
            if on_progress is not None:
                on_progress(event.message)
            return
        self.replies[event.rank] = event.message
        if isinstance(event.message, Failure):
            self._grace = min(self._grace, time.monotonic() + GRACE_SECONDS)

    def _check(self) -> None:
        """Raise when the ranks that have not answered will not, or not in time."""
        if self._vigil.due() and self._cancelled == float("inf"):
            return  # most calls are over before anybody has to look
        missing = [rank for rank in self.ranks if rank not in self.replies]
        if not missing:
            return
        if time.monotonic() >= self._cancelled:
            raise Unanswered(
                f"interrupted; the ranks did not stop within {self._limits.cancel:.0f} s and were ended. "
                f"{NEXT}\n{self._processes.stacks(missing)}"
            )
        if not self._vigil.due():
            reason = self._vigil.look(missing)
            if reason is not None:
                raise WorkerDied(f"{reason} {self._doing()}. {NEXT}\n{self._processes.stacks(missing)}")

    def _doing(self) -> str:
        """What they were at."""
        if self._step is None:
            return f"in {self._kind}"
        return f"in {self._kind}, after step {self._step.step} of {self._step.steps}"
