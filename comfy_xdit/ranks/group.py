"""WorkerGroup owns the ranks of one layout: start, call, end; one call at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comfy_xdit.protocol.errors import (
    Interrupted,
    InvalidInput,
    OutOfDeviceMemory,
    RemoteError,
    WorkerDied,
    XDiTError,
)
from comfy_xdit.protocol.messages import Cancelled, Failure, Forget, Progress, Result, Stop
from comfy_xdit.protocol.parallel import DEGREES, ParallelConfig, available_devices
from comfy_xdit.protocol.rpc import Event, Host
from comfy_xdit.ranks.agreement import agree, is_consequence
from comfy_xdit.ranks.claims import Claim
from comfy_xdit.ranks.conversation import CLOSED, POLL_SECONDS, Conversation, Unanswered
from comfy_xdit.ranks.deadlines import Deadlines
from comfy_xdit.ranks.deaths import Deaths
from comfy_xdit.ranks.logs import RankLogs
from comfy_xdit.ranks.processes import NEXT, RankProcesses
from comfy_xdit.ranks.shortage import cannot_start
from comfy_xdit.ranks.timing import Timing, ledger

STOP_SECONDS = 5.0  # for idle ranks to go by themselves
START = "the start"
_generations = itertools.count(1)


class WorkerGroup:
    """The ranks of one layout. Started by the first call, and again by the first after a fault.

    Args:
        parallel: the layout; its devices are filled in when it names none.
        program: the module a rank runs; another one than the engine only in benchmarks and tests.
    """

    def __init__(self, parallel: ParallelConfig, program: str = "worker"):
        self._program = program
        self.parallel = parallel.check(available_devices())
        self.start_seconds = 0.0
        self.generation = 0
        self._turn = threading.Lock()
        self._closes = self._job = 0
        self._bridge: Host | None = None
        self._processes: RankProcesses | None = None
        self._claim: Claim | None = None
        self._logs: RankLogs | None = None
        self._deadlines, self._deaths = Deadlines(), Deaths()
        self.reports: list[dict[str, Any]] = []
        self.timings: dict[str, Timing] = {}  # of the last call of each kind of message

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty while the group is down."""
        processes = self._processes
        return [] if processes is None else processes.pids

    @property
    def busy(self) -> bool:
        """Whether a call is in progress: another one would wait for it."""
        return self._turn.locked()

    @property
    def logs(self) -> str:
        """Where the logs of the ranks are, in words; empty where there are none."""
        return "" if self._logs is None else self._logs.where

    def call(
        self,
        message: Any,
        *,
        ranks: Sequence[int] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        guess: float | None = None,
    ) -> Result:
        """Have `message` done by `ranks` (default: all) and return the answer of the first of them.

        Args:
            message: a word of messages.py, or a function that makes it of the group's generation
                (a number that grows when the ranks remember nothing: with every start, for one).
            on_progress: gets every Progress of the ranks.
            interrupted: asked about 20 times a second whether the person wants to stop.
            guess: seconds a step may take, where the caller knows; counts where it is longer than any seen.

        Raises:
            InvalidInput: the ranks refused the input; they are as before.
            RemoteError: a rank raised; carries the rank and its traceback.
            DeviceInUse: the ranks are not up, and another program's compute on one of their devices.
            WorkerDied: a rank ended or hangs (see deadlines.py), or the group was closed meanwhile.
            Interrupted: `interrupted` returned True, and the ranks stopped at a step boundary or were ended.
        """
        with self._in_turn(interrupted) as closes, self._logged():
            if not self._is_up():
                self._start(interrupted, closes)
            return self._exchange(message, ranks, on_progress, interrupted, guess)

    def tell(self, message: Any, *, ranks: Sequence[int] | None = None) -> Result | None:
        """As `call`, of a group that runs; None, and nothing is started, of one that does not."""
        with self._in_turn(None):
            if isinstance(message, Forget) and message.specs is None:
                self._deaths.forget()
            return self._exchange(message, ranks) if self._is_up() else None

    def close(self) -> None:
        """End the ranks: idle ones are asked first; a call in progress or waiting fails at once."""
        self._closes += 1
        if (bridge := self._bridge) is not None:
            bridge.inbox.put(Event(-1, closed=True))
        with self._turn:
            self._deaths.forget()
            if self._bridge is None:
                return
            with contextlib.suppress(RuntimeError):  # the store, if the bridge is already broken
                self._bridge.send(list(range(self.parallel.world_size)), -1, Stop())
                self._processes.wait(STOP_SECONDS)
            self._end()

    @contextlib.contextmanager
    def _in_turn(self, interrupted: Callable[[], bool] | None) -> Iterator[int]:
        """One call after the other; yields how often the group has been closed."""
        closes = self._closes
        while not self._turn.acquire(timeout=POLL_SECONDS if interrupted is not None else -1):
            if interrupted():
                raise Interrupted("interrupted while the ranks were busy with another call")
        try:
            if self._closes != closes:
                raise WorkerDied(f"{CLOSED}. {NEXT}")
            yield closes
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """What the ranks died of or raised says where to read more."""
        try:
            yield
        except (RemoteError, WorkerDied) as error:
            if self._logs is not None:
                self._logs.name_in(error)
            raise

    # ------------------------------------------------------------------ start and end

    def _is_up(self) -> bool:
        """Whether the ranks run. One that ended or was stopped when idle costs no call: new ones start."""
        if self._bridge is not None and not self._processes.are_up():
            self._end()
        return self._bridge is not None

    def _start(self, interrupted: Callable[[], bool] | None, closes: int) -> None:
        self._deaths.check()
        began = time.monotonic()
        world = list(range(self.parallel.world_size))
        try:
            self._launch(self._while_starting(interrupted, closes))
            self._deadlines.restart()
            talk = self._conversation(0, world, START, None)
            replies = talk.collect(None, _raising(interrupted))
            self._deadlines.learn(START, talk.longest, done=True)
            self._verdict(world, replies, START)
        except BaseException as error:
            self._end(START, error)
            raise
        self._deaths.survived(START)
        self.reports = [replies[rank].report for rank in world]
        self.start_seconds = time.monotonic() - began
        self.generation = next(_generations)

    def _launch(self, waiting: Callable[[], None]) -> None:
        """Make the bridge and the processes. Raises XDiTError when the machine has not what they need."""
        degrees = {name: getattr(self.parallel, name) for name in (*DEGREES, "shard_weights")}
        ranks, devices = self.parallel.world_size, self.parallel.devices
        try:
            self._claim = Claim(devices)
            self._logs = RankLogs(ranks, layout=self.parallel.describe(), devices=devices)
            self._bridge = Host(ranks, os.getpid(), degrees, self._logs.files)
            waiting()  # it may have been closed before there was a bridge to say it to
            self._processes = RankProcesses(self._program, devices, self._bridge, waiting)
        except XDiTError:
            raise
        except (OSError, RuntimeError, MemoryError) as error:
            raise cannot_start(error) from error

    def _while_starting(self, interrupted: Callable[[], bool] | None, closes: int) -> Callable[[], None]:
        """Raises what ends a start that no rank answers yet."""

        def check() -> None:
            if self._closes != closes:
                raise WorkerDied(f"{CLOSED}. {NEXT}")
            if interrupted is not None:
                _raising(interrupted)()

        return check

    def _end(self, kind: str = "", error: BaseException | None = None) -> None:
        """End the ranks, because of `error` in a call of this `kind`, if they died of one."""
        if isinstance(error, WorkerDied):
            self._deaths.note(kind, error)
        processes, bridge, claim = self._processes, self._bridge, self._claim
        self._processes, self._bridge, self._claim, self.reports = None, None, None, []
        if processes is not None:
            processes.kill()
        if claim is not None:
            claim.release()
        if self._logs is not None:
            self._logs.close(command=kind, error=str(error or ""))
        if bridge is not None:
            bridge.close()

    # ------------------------------------------------------------------ one call

    def _exchange(
        self,
        message: Any,
        ranks: Sequence[int] | None,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        guess: float | None = None,
    ) -> Result:
        """Send, collect and judge; the group runs and it is this call's turn."""
        ranks = list(range(self.parallel.world_size) if ranks is None else ranks)
        self._job += 1
        if callable(message):
            message = message(self.generation)
        if isinstance(message, Forget) and message.specs is None:
            self.generation = next(_generations)  # from here on they are as new
        kind = type(message).__name__
        talk = self._conversation(self._job, ranks, kind, guess)
        began = time.perf_counter()
        sent = self._send(ranks, kind, message)
        try:
            replies = talk.collect(on_progress, interrupted)
        except (WorkerDied, Unanswered) as error:
            self._end(kind, error)
            raise
        except (KeyboardInterrupt, SystemExit):  # nobody waits for the ranks
            self._end()
            raise
        except BaseException:  # of the host: a preview that fails; ComfyUI's cancel, no Exception in 0.33
            self._settle(talk)
            raise
        finally:
            self._deadlines.learn(kind, talk.longest, done=talk.is_done)
        answer = self._verdict(ranks, replies, kind)
        host, results = time.perf_counter() - began, [replies[rank] for rank in ranks]
        self.timings[kind] = Timing.of(host, results, sent, talk.received, talk.steps)
        ledger.note(kind, self.timings[kind])
        self._deaths.survived(kind)
        return answer

    def _send(self, ranks: list[int], kind: str, message: Any) -> int:
        """Give the message to the ranks; a bad one raises TypeError or ValueError before anything is sent."""
        try:
            return self._bridge.send(ranks, self._job, message)
        except OSError as error:
            raise XDiTError(
                f"there is no memory to hand a message to the ranks: {error}; free some of the machine's, "
                "or send a smaller picture."
            ) from error
        except RuntimeError as error:  # the store
            died = WorkerDied(f"the bridge to the ranks failed: {error}. {NEXT}")
            self._end(kind, died)
            raise died from error

    def _conversation(self, job: int, ranks: list[int], kind: str, guess: float | None) -> Conversation:
        limits = self._deadlines.limits(kind, guess)
        return Conversation(self._bridge, self._processes, job, ranks, kind, limits)

    def _settle(self, talk: Conversation) -> None:
        """After an error in the host in mid-call: bring the ranks back to idle in time, or end them."""
        try:
            talk.cancel()
            replies = talk.collect()
        except (WorkerDied, Unanswered):
            self._end()
            return
        except BaseException:
            self._end()
            raise
        if not agree(replies, talk.ranks):
            self._end()

    def _verdict(self, ranks: list[int], replies: dict[int, Any], kind: str) -> Any:
        """The answer, or the exception that the replies amount to."""
        agreed = agree(replies, ranks)
        failures = {rank: m for rank, m in replies.items() if isinstance(m, Failure)}
        if not agreed:  # the ranks are no longer in step: only new processes are trustworthy
            disagreed = WorkerDied(
                f"the ranks disagreed about {kind} and were ended. {NEXT}\n{self._processes.tails()}"
            )
            self._end(kind, None if failures else disagreed)
        if failures:
            rank, failure = min(failures.items(), key=lambda item: is_consequence(item[1]))
            if failure.invalid and agreed:
                raise InvalidInput(failure.message)
            error = RemoteError(rank, failure.kind, failure.message, failure.traceback)
            raise OutOfDeviceMemory.of(error) if error.out_of_memory else error
        if not agreed:
            raise disagreed
        if isinstance(replies[ranks[0]], Cancelled):
            raise Interrupted(f"interrupted at step {replies[ranks[0]].step}")
        return replies[ranks[0]]


def _raising(interrupted: Callable[[], bool] | None) -> Callable[[], bool] | None:
    """A group that is still starting has no step to stop at: an interrupt ends the start."""

    def check() -> bool:
        if interrupted():
            raise Interrupted("interrupted while the ranks were starting")
        return False

    return check if interrupted is not None else None
