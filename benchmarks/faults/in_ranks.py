"""Faults of ranks: deaths, exceptions, hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.plan import CLOSE, START, Plan, mark_moment, moment
from benchmarks.faults.scene import DEATH, EXCEPTION, STOP, Fault, Scene, Seen, hang_bound
from comfy_xdit.ranks import deadlines
from tests.waiting import ends_within, within

CLOSING = 8.0  # seconds that idle ranks have to go by themselves, and some


def planned(
    kind: str, name: str, bound: float, says: str | None, do: str, /,
    at: str = "Sample", rank: int | None = 1, keeps: bool = False, **words: Any,
) -> Fault:  # fmt: skip
    """A fault that a rank makes by itself."""
    plan = Plan(at, do, rank, words)
    return Fault(kind, name, bound, says, lambda scene: scene.see_planned(plan), keeps)


def _by_signal(name: str, number: int, says: str, **where: Any) -> Fault:
    return planned("death", name, DEATH, says, "signal", number=int(number), **where)


DEATHS = [
    _by_signal("kill -9 of rank 0 in a loop", signal.SIGKILL, "rank 0 .*SIGKILL", rank=0),
    _by_signal("kill -9 of rank 1 in a loop", signal.SIGKILL, "rank 1 .*SIGKILL"),
    _by_signal("kill -9 of both in a loop", signal.SIGKILL, "SIGKILL", rank=None),
    _by_signal("kill -9 at the start", signal.SIGKILL, "SIGKILL", at=START),
    _by_signal("kill -9 while loading", signal.SIGKILL, "SIGKILL.* in Load", at="Load"),
    _by_signal("kill -9 while decoding", signal.SIGKILL, "SIGKILL.* in Decode", at="Decode"),
    _by_signal("SIGTERM", signal.SIGTERM, "rank 1 .*SIGTERM"),
    _by_signal("SIGHUP", signal.SIGHUP, "rank 1 .*SIGHUP"),
    _by_signal("SIGINT", signal.SIGINT, "rank 1 "),
    _by_signal("a real-time signal", 40, "rank 1 .*ended by signal 40"),
    planned("death", "SIGSEGV: a bad pointer", DEATH, "SIGSEGV[\\s\\S]*read_nowhere", "read nowhere"),
    planned("death", "SIGBUS: a mapped file was cut off", DEATH, "SIGBUS", "read what was cut off"),
    planned("death", "SIGABRT", DEATH, "SIGABRT", "abort"),
    planned("death", "exit with code 0 in a loop", DEATH, "rank 1 .*exited with code 0", "leave", code=0),
    planned("death", "exit in a collective", DEATH, "rank 1 .*code 3", "leave in a collective", rank=None),
    planned("death", "exit at the start", DEATH, "exited with code 5", "leave", at=START, code=5),
    planned("death", "exit while loading", DEATH, "code 5 in Load", "leave", at="Load", code=5, rank=0),
    planned("death", "SystemExit is raised", DEATH, "rank 1 ", "raise", kind="SystemExit"),
    planned(
        "death", "the thread that shows life ends", DEATH, "code 18[\\s\\S]*KeyError", "lose the heartbeat"
    ),
    planned("death", "SIGSEGV at the end", CLOSING, None, "read nowhere", at=CLOSE),
]


def _failing(
    name: str, says: str, kind: str, text: str = "on purpose", times: int = 1, **where: Any
) -> Fault:
    words = {"kind": kind, "text": text, "times": times}
    return planned("exception", name, EXCEPTION, says, "fail", **words, **where)


EXCEPTIONS = [
    _failing(
        "on rank 0 only, others in a collective", "rank 0: ValueError: on purpose", "ValueError", rank=0
    ),
    _failing("on rank 1 only, others in a collective", "rank 1: ValueError: on purpose", "ValueError"),
    _failing("on both ranks", "ValueError: on purpose", "ValueError", rank=None, keeps=True),
    _failing("6 MB of text", "characters left out", "ValueError", "abcdef", 1_000_000, rank=None, keeps=True),
    _failing("refused input on one rank only", "on purpose", "InvalidInput"),
    _failing("refused input on both", "on purpose", "InvalidInput", rank=None, keeps=True),
    _failing("while loading", "rank 1: ValueError", "ValueError", at="Load"),
    _failing("while decoding", "rank 1: ValueError", "ValueError", at="Decode"),
    _failing("at the start", "exited with code 1[\\s\\S]*ValueError", "ValueError", at=START),
    planned(
        "exception",
        "a package is missing",
        EXCEPTION,
        "requirements.txt",
        "raise",
        at=START,
        rank=None,
        kind="ImportError",
    ),
    planned(
        "exception", "no memory in one rank (RLIMIT_AS)", EXCEPTION, "shard_weights", "want too much memory"
    ),
    planned(
        "exception",
        "no memory in both",
        EXCEPTION,
        "shard_weights",
        "want too much memory",
        rank=None,
        keeps=True,
    ),
    planned(
        "exception",
        "with a full disk under the log (/dev/full)",
        EXCEPTION,
        "with a full disk",
        "fail with a full disk",
    ),
    planned(
        "exception",
        "no file of a rank may grow (RLIMIT_FSIZE)",
        EXCEPTION,
        "exited with code 1",
        "grow no file",
        at=START,
        rank=None,
    ),
]


def _hanging(name: str, says: str, do: str, deadline: float | None = None, **where: Any) -> Fault:
    bound = hang_bound(deadlines.WAIT_SECONDS if deadline is None else deadline)
    return planned("hang", name, bound, says, do, **where)


def _cancelled(scene: Scene) -> Seen:
    return scene.see_planned(Plan("Sample", "hang", 1), interrupted=lambda: moment() is not None)


HANGS = [
    _hanging("rank 1, the GIL released", "stuck[\\s\\S]*in hang", "hang"),
    _hanging("rank 0, the GIL released", "stuck[\\s\\S]*in hang", "hang", rank=0),
    _hanging("both ranks", "stuck[\\s\\S]*in hang", "hang", rank=None),
    _hanging("rank 1, the GIL held", "stuck[\\s\\S]*in hang_with", "hang with the interpreter"),
    _hanging(
        "computing for ever, the GIL held",
        "interpreter has not run[\\s\\S]*in spin_with",
        "spin with the interpreter",
        deadlines.MUTE_SECONDS,
    ),
    _hanging("in a collective that the others leave out", "rank|stuck", "meet nobody"),
    _hanging("while loading", "stuck.* in Load", "hang", at="Load"),
    _hanging("while decoding", "stuck.* in Decode", "hang", at="Decode"),
    _hanging("at the start", "stuck.* in the start", "hang", deadlines.FIRST_WAIT_SECONDS, at=START),
    _hanging(
        "stopped (SIGSTOP)",
        "stuck: its process is stopped",
        "signal",
        deadlines.STOPPED_SECONDS,
        number=int(signal.SIGSTOP),
    ),
    planned("hang", "at the end", CLOSING, None, "hang", at=CLOSE),
    Fault(
        "hang",
        "cancelled while a rank hangs",
        hang_bound(deadlines.CANCEL_SECONDS + 1.0),
        "did not stop within",
        _cancelled,
    ),
]


def _idle(number: int, ranks: tuple[int, ...], is_done: Callable[[int], bool]) -> Callable[[Scene], Seen]:
    """A job after idle ranks were sent a signal, which has done what it does to all their threads."""

    def inject(scene: Scene) -> Seen:
        victims = [scene.group.pids[rank] for rank in ranks]

        def do() -> None:
            for victim in victims:
                os.kill(victim, number)
            within(STOP, lambda: all(map(is_done, victims)))
            mark_moment()

        return scene.see_a_job(do)

    return inject


def _is_gone(pid: int) -> bool:
    return ends_within(pid, STOP)


def _is_stopped(pid: int) -> bool:
    states = [
        file.read_text().rpartition(")")[2].split()[0] for file in Path("/proc").glob(f"{pid}/task/*/stat")
    ]
    return set(states) == {"T"}


STARTING = 60.0  # seconds in which new ranks have started and drawn
IDLE = [
    Fault("idle", "kill -9 of an idle rank", STARTING, None, _idle(signal.SIGKILL, (1,), _is_gone)),
    Fault("idle", "kill -9 of both ranks, idle", STARTING, None, _idle(signal.SIGKILL, (0, 1), _is_gone)),
    Fault("idle", "SIGSTOP of an idle rank", STARTING, None, _idle(signal.SIGSTOP, (0,), _is_stopped)),
]
FAULTS = [*DEATHS, *EXCEPTIONS, *HANGS, *IDLE]
