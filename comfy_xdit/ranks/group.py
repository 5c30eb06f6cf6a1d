"""WorkerGroup owns the rank processes: spawn, call, interrupt, watch, restart, close."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from comfy_xdit.protocol.errors import Interrupted, InvalidInput, RemoteError, WorkerDied
from comfy_xdit.protocol.messages import Cancelled, Failure, Forget, Progress, Result, Stop
from comfy_xdit.protocol.parallel import DEGREES, ParallelConfig, available_devices
from comfy_xdit.protocol.rpc import Event, Host
from comfy_xdit.ranks.agreement import agree, is_consequence
from comfy_xdit.ranks.environment import ROOT, rank_environment

START_SECONDS = 180.0
CALL_SECONDS = 3600.0  # without any sign of life from a rank; progress starts it anew
GRACE_SECONDS = 3.0  # between the first failure and the last answer: the others hang in a collective
STOP_SECONDS = 5.0
STUCK_SECONDS = 30.0  # without a heartbeat: the process is stopped, or its interpreter hangs
LIFE_SECONDS = 1.0  # how often heartbeats are looked at while nothing else happens
POLL_SECONDS = 0.05  # how often the host's interrupt flag, which cannot be waited on, is looked at
LOG_TAIL_BYTES = 3000
_generations = itertools.count(1)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: as the host waited, and as the slowest rank worked.

    `sent` and `received` are the bytes that crossed the bridge, seen from the host.
    """

    host: float
    rank: float
    sent: int = 0
    received: int = 0

    @property
    def bridge(self) -> float:
        """What was not work in the ranks: sending, waiting, receiving."""
        return self.host - self.rank


class WorkerGroup:
    """The ranks of one layout. Started by the first call, and again by the first after a fault.

    Args:
        parallel: the layout; its devices are filled in when it names none.
        program: the module a rank runs; another one than the engine only in benchmarks.
    """

    def __init__(self, parallel: ParallelConfig, program: str = "worker"):
        self._program = program
        self.parallel = parallel.check(available_devices())
        self.start_seconds = 0.0
        self.generation = 0
        self._lock = threading.Lock()
        self._job = self._received = 0
        self._bridge: Host | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self.reports: list[dict[str, Any]] = []
        self.timings: dict[str, Timing] = {}  # of the last call of each kind of message

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty while the group is down."""
        return [p.pid for p in self._processes]

    def call(
        self,
        message: Any,
        *,
        ranks: Sequence[int] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        timeout: float = CALL_SECONDS,
    ) -> Result:
        """Have `message` done by `ranks` (default: all) and return the answer of the first of them.

        Args:
            message: a word of messages.py, or a function that makes it of the group's generation
                (a number that grows when the ranks remember nothing: with every start, for one).
            on_progress: gets every Progress of the ranks.
            interrupted: asked about 20 times a second whether the person wants to stop.
            timeout: seconds without any sign of life from a rank after which it counts as dead.

        Raises:
            InvalidInput: the ranks refused the input; they are as before.
            RemoteError: a rank raised; carries the rank and its traceback.
            WorkerDied: a rank ended, or gave no sign of life for `timeout` seconds.
            Interrupted: `interrupted` returned True and the ranks stopped at a step boundary.
        """
        with self._lock:
            self._ensure_started(interrupted)
            return self._exchange(message, ranks, on_progress, interrupted, timeout)

    def tell(self, message: Any, *, ranks: Sequence[int] | None = None) -> Result | None:
        """As `call`, of a group that runs; None, and nothing is started, of one that does not."""
        with self._lock:
            if self._bridge is None or any(_has_ended(p.pid) for p in self._processes):
                return None
            return self._exchange(message, ranks)

    def close(self) -> None:
        """Stop the ranks: asked first, killed if they do not go."""
        with self._lock:
            if self._bridge is None:
                return
            with contextlib.suppress(RuntimeError):  # the store, if the bridge is already broken
                self._bridge.send(list(range(len(self._processes))), -1, Stop())
            deadline = time.monotonic() + STOP_SECONDS
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            self._kill()

    # ------------------------------------------------------------------ start and end

    def _ensure_started(self, interrupted: Callable[[], bool] | None) -> None:
        if self._bridge is not None and any(_has_ended(p.pid) for p in self._processes):
            # Died between two calls: nothing was asked of it, so the call need not fail.
            self._kill()
        if self._bridge is None:
            self._start(interrupted)

    def _start(self, interrupted: Callable[[], bool] | None) -> None:
        began = time.monotonic()
        world = range(self.parallel.world_size)
        degrees = {name: getattr(self.parallel, name) for name in (*DEGREES, "shard_weights")}
        self._bridge = Host(self.parallel.world_size, os.getpid(), degrees)
        try:
            self._logs = [tempfile.TemporaryFile() for _ in world]  # noqa: SIM115 - closed by _kill
            self._processes = [self._spawn(rank) for rank in world]
            for rank in world:
                threading.Thread(
                    target=_watch, args=(rank, self._processes[rank], self._bridge), daemon=True
                ).start()
            replies = self._collect(0, list(world), None, _raising(interrupted), START_SECONDS)
            self._verdict(list(world), replies)
        except BaseException:
            self._kill()
            raise
        self.reports = [replies[rank].report for rank in world]
        self.start_seconds = time.monotonic() - began
        self.generation = next(_generations)

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        invitation = self._bridge.invitation(rank)
        process = subprocess.Popen(
            [sys.executable, "-m", self._program],
            cwd=ROOT,
            env=rank_environment(rank, self.parallel.devices),
            stdin=subprocess.PIPE,
            stdout=self._logs[rank],
            stderr=subprocess.STDOUT,
            pass_fds=(invitation.inbound, invitation.outbound),
            start_new_session=True,  # a Ctrl-C in the terminal is the host's to handle
        )
        with contextlib.suppress(BrokenPipeError):  # it died already: the watcher reports it
            process.stdin.write(invitation.line())
            process.stdin.flush()
        return process

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if self._bridge is not None:
            self._bridge.close()
        for log in self._logs:
            log.close()
        self._bridge, self._processes, self._logs, self.reports = None, [], [], []

    # ------------------------------------------------------------------ one call

    def _exchange(
        self,
        message: Any,
        ranks: Sequence[int] | None,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        timeout: float = CALL_SECONDS,
    ) -> Result:
        """Send, collect and judge; the group runs and its lock is held."""
        ranks = list(range(self.parallel.world_size) if ranks is None else ranks)
        self._job, self._received = self._job + 1, 0
        if callable(message):
            message = message(self.generation)
        if isinstance(message, Forget) and message.specs is None:
            self.generation = next(_generations)  # from here on they are as new
        began = time.perf_counter()
        try:
            sent = self._bridge.send(ranks, self._job, message)
        except RuntimeError as error:  # the store; a bad message raises before anything is sent
            self._kill()
            raise WorkerDied(f"the bridge to the ranks failed: {error}") from error
        try:
            replies = self._collect(self._job, ranks, on_progress, interrupted, timeout)
        except WorkerDied:
            self._kill()
            raise
        except BaseException:
            self._settle(self._job, ranks)
            raise
        answer = self._verdict(ranks, replies)
        host, worked = time.perf_counter() - began, max(reply.seconds for reply in replies.values())
        self.timings[type(message).__name__] = Timing(host, worked, sent, self._received)
        return answer

    def _collect(
        self,
        job: int,
        ranks: list[int],
        on_progress: Callable[[Progress], None] | None,
        interrupted: Callable[[], bool] | None,
        timeout: float,
    ) -> dict[int, Any]:
        """The last message of every rank: all of them, or fewer when one failed and others hang."""
        replies: dict[int, Any] = {}
        deadline, asked = time.monotonic() + timeout, False
        while len(replies) < len(ranks):
            if interrupted is not None and not asked and interrupted():
                self._bridge.interrupt(job)
                asked = True
            pause = POLL_SECONDS if interrupted is not None and not asked else LIFE_SECONDS
            event = self._next(min(deadline, time.monotonic() + pause))
            failed = any(isinstance(m, Failure) for m in replies.values())
            if event is None and time.monotonic() >= deadline:
                if failed:
                    return replies
                raise WorkerDied(f"no answer from the ranks for {timeout:g} s; {self._tails()}")
            if event is None:
                self._check_heartbeats()
            if event is None or event.job != job:
                continue
            self._received += event.nbytes
            if isinstance(event.message, Progress):
                deadline = deadline if failed else time.monotonic() + timeout
                if on_progress is not None:
                    on_progress(event.message)
                continue
            replies[event.rank] = event.message
            if isinstance(event.message, Failure):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return replies

    def _next(self, until: float) -> Event | None:
        """The next event, or None when none came in time. Raises WorkerDied."""
        event = self._bridge.wait(max(0.0, until - time.monotonic()))
        if event is None:
            return None
        if event.fault is not None:
            raise WorkerDied(f"the bridge to the ranks failed: {event.fault}; {self._tails()}")
        if event.exit_code is not None:
            raise WorkerDied(self._obituary(event.rank, event.exit_code))
        return event

    def _check_heartbeats(self) -> None:
        for rank, process in enumerate(self._processes):
            silent = self._bridge.silent_for(rank)
            if silent > STUCK_SECONDS:
                raise WorkerDied(
                    f"rank {rank} ({self.parallel.devices[rank]}, pid {process.pid}) is stuck: it has not "
                    f"run for {silent:.0f} s; the next run starts new ranks; {self._tail(rank)}"
                )

    def _settle(self, job: int, ranks: list[int]) -> None:
        """After an error in the host in mid-call: bring the ranks back to idle, or end them."""
        try:
            self._bridge.interrupt(job)
            replies = self._collect(job, ranks, None, None, CALL_SECONDS)
        except (WorkerDied, RuntimeError):
            self._kill()
            return
        if not agree(replies, ranks):
            self._kill()

    def _verdict(self, ranks: list[int], replies: dict[int, Any]) -> Any:
        """The answer, or the exception that the replies amount to."""
        agreed = agree(replies, ranks)
        failures = {rank: m for rank, m in replies.items() if isinstance(m, Failure)}
        tails = "" if agreed else self._tails()
        if not agreed:
            self._kill()  # the ranks are no longer in step: only new processes are trustworthy
        if failures:
            rank, failure = min(failures.items(), key=lambda item: is_consequence(item[1]))
            if failure.invalid and agreed:
                raise InvalidInput(failure.message)
            raise RemoteError(rank, failure.kind, failure.message, failure.traceback)
        if not agreed:
            raise WorkerDied(f"the ranks disagreed about the run and were stopped; {tails}")
        if isinstance(replies[ranks[0]], Cancelled):
            raise Interrupted(f"interrupted at step {replies[ranks[0]].step}")
        return replies[ranks[0]]

    # ------------------------------------------------------------------ words about the dead

    def _obituary(self, rank: int, exit_code: int) -> str:
        if exit_code < 0:
            name = signal.Signals(-exit_code).name
            cause = f"was ended by {name}"
            if -exit_code == signal.SIGKILL:
                cause += " (if nobody did that, the system ran out of memory)"
        else:
            cause = f"exited with code {exit_code}"
        device, pid = self.parallel.devices[rank], self._processes[rank].pid
        return f"rank {rank} ({device}, pid {pid}) {cause}; {self._tail(rank)}"

    def _tails(self) -> str:
        return "\n".join(self._tail(rank) for rank in range(len(self._logs)))

    def _tail(self, rank: int) -> str:
        log = self._logs[rank]
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - LOG_TAIL_BYTES))
        text = log.read().decode(errors="replace").strip()
        return f"last lines of rank {rank}'s log:\n{text or '(empty)'}"


def _has_ended(pid: int) -> bool:
    """Whether a child of this process has ended, reaped or not.

    Not `Popen.poll`: while the watcher waits for the child, poll says None of a dead one.
    """
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _watch(rank: int, process: subprocess.Popen[bytes], bridge: Host) -> None:
    bridge.inbox.put(Event(rank, exit_code=process.wait()))


def _raising(interrupted: Callable[[], bool] | None) -> Callable[[], bool] | None:
    """A group that is still starting has no step to stop at: an interrupt ends the start."""

    def check() -> bool:
        if interrupted():
            raise Interrupted("interrupted while the ranks were starting")
        return False

    return check if interrupted is not None else None
