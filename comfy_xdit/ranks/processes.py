"""The processes of a group: started, watched, asked where they hang, ended; and words about the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from comfy_xdit import ROOT
from comfy_xdit.protocol.rpc import Event, Host, Reported
from comfy_xdit.ranks.environment import rank_environment
from comfy_xdit.ranks.output import Output, Shortening
from comfy_xdit.ranks.template import Forked, fork

KILL_SECONDS = 5.0
NOT_UP = "ZXT"  # states of /proc/<pid>/stat: ended, or stopped
STACK_SECONDS = 2.5  # for all ranks to write where they are
STACK_POLL_SECONDS = 0.02
# How the stack of a main thread ends; of more than a hundred frames faulthandler leaves the rest out.
_LAST_FRAMES = ("in _run_module_as_main", "...")
NEXT = "Press Run again: new ranks start."


class RankProcesses:
    """One process per device, and what it prints.

    Args:
        program: the module that each runs.
        waiting: called again and again until there are all; what it raises ends the start.

    Raises:
        OSError: a process or a file could not be made; those that were are ended.
    """

    def __init__(self, program: str, devices: Sequence[str], bridge: Host, waiting: Callable[[], None]):
        self.devices = tuple(devices)
        self._outputs: list[Output] = []
        self._processes: list[subprocess.Popen[bytes] | Forked] = []
        self._shortening: Shortening | None = None
        try:
            for rank in range(len(devices)):
                self._outputs.append(Output())
                self._processes.append(self._begin(program, rank, bridge, waiting))
            self._shortening = Shortening(self._outputs)
        except BaseException:
            self.kill()
            raise
        for rank, process in enumerate(self._processes):
            threading.Thread(
                target=_watch, args=(rank, process, bridge), name=f"comfy_xdit rank {rank}", daemon=True
            ).start()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def are_up(self) -> bool:
        """Whether every process runs: none has ended, none is stopped (SIGSTOP)."""
        return all(_is_up(process.pid) for process in self._processes)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, or the time is over."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End every process and let go of what they printed."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver that does not return
                process.wait(KILL_SECONDS)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if self._shortening is not None:
            self._shortening.end()
        for output in self._outputs:
            output.close()
        self._processes, self._outputs = [], []

    def name(self, rank: int) -> str:
        """A rank in words."""
        return f"rank {rank} ({self.devices[rank]}, pid {self._processes[rank].pid})"

    def obituary(self, rank: int, exit_code: int, doing: str) -> str:
        """What ended a rank, what it was `doing`, what happens next, and what it said last."""
        return f"{self.name(rank)} {_cause(exit_code)} {doing}. {NEXT}\n{self.tail(rank)}"

    def tails(self, ranks: Collection[int] | None = None) -> str:
        """The last lines of the logs of some ranks, or of all."""
        return "\n".join(self.tail(rank) for rank in (range(len(self._outputs)) if ranks is None else ranks))

    def tail(self, rank: int) -> str:
        """The last lines of a rank's log."""
        text = self._outputs[rank].text()
        return f"Last lines of rank {rank}'s log:\n{text}" if text else f"The log of rank {rank} is empty."

    def stacks(self, ranks: Collection[int]) -> str:
        """The Python stacks of some ranks, written by the ranks themselves (faulthandler) into their logs."""
        begins = {rank: self._outputs[rank].size for rank in ranks}
        asked = [rank for rank in ranks if _is_up(self._processes[rank].pid)]  # a stopped one cannot answer
        for rank in asked:
            self._processes[rank].send_signal(signal.SIGUSR1)
        deadline, written = time.monotonic() + STACK_SECONDS, dict.fromkeys(ranks, "")
        while asked and time.monotonic() < deadline:
            time.sleep(STACK_POLL_SECONDS)
            written |= {rank: self._outputs[rank].text(begins[rank]) for rank in asked}
            asked = [rank for rank in asked if not written[rank].endswith(_LAST_FRAMES)]
        return "\n".join(
            f"Where rank {rank} is:\n{text}" if text else f"Rank {rank} does not say where it is."
            for rank, text in written.items()
        )

    def _begin(
        self, program: str, rank: int, bridge: Host, waiting: Callable[[], None]
    ) -> subprocess.Popen[bytes] | Forked:
        invitation, log = bridge.invitation(rank), self._outputs[rank]
        environment = rank_environment(rank, self.devices)
        process = fork(program, environment, log, invitation.descriptors, waiting)
        if process is None:
            process = _spawn(program, environment, log, invitation.descriptors)
        with contextlib.suppress(BrokenPipeError):  # it died already: the watcher reports it
            process.stdin.write(invitation.line())
            process.stdin.flush()
        return process


def _spawn(
    program: str, environment: dict[str, str], log: Output, descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", program],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        start_new_session=True,  # a Ctrl-C in the terminal is the host's to handle
    )


def _watch(rank: int, process: subprocess.Popen[bytes] | Forked, bridge: Host) -> None:
    with Reported(bridge.inbox, f"thread that waits for rank {rank}"):
        bridge.inbox.put(Event(rank, exit_code=process.wait()))


def _is_up(pid: int) -> bool:
    """Whether a child of this process runs: it has not ended, reaped or not, and is not stopped.

    Not `Popen.poll`: while the watcher waits for the child, poll says None of a dead one. Nor waitid alone:
    it says nothing of one whose threads are still ending or stopping.
    """
    try:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    except ChildProcessError:
        return False
    with contextlib.suppress(OSError):  # there is no /proc
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in NOT_UP
    return True


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    if -exit_code == signal.SIGKILL:
        return "was ended by SIGKILL (if nobody did that, the system ran out of memory)"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:  # a real-time signal, which has no name
        return f"was ended by signal {-exit_code}"
