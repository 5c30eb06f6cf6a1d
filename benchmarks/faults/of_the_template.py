"""Faults of the process that ranks are forked from: those that run do not need it, new ones start without."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil

from benchmarks.faults.plan import mark_moment
from benchmarks.faults.scene import Fault, Scene, Seen
from comfy_xdit.ranks.template import FORK_SECONDS

JOB, STARTING = 10.0, 60.0  # seconds in which a job is done, and ranks have started and done one
STOPPED = FORK_SECONDS + STARTING


def _template(number: int, start: bool) -> Callable[[Scene], Seen]:
    """A job after the template was sent a signal; with `start`, by new ranks."""

    def inject(scene: Scene) -> Seen:
        def do() -> None:
            for child in psutil.Process().children():
                # What is forked has the same command line.
                if "worker.template" in child.cmdline() and child.pid not in scene.group.pids:
                    os.kill(child.pid, number)
            if start:
                scene.group.close()
            mark_moment()

        return scene.see_a_job(do)

    return inject


FAULTS = [
    Fault("template", "kill -9 while ranks run", JOB, None, _template(signal.SIGKILL, False), keeps=True),
    Fault("template", "kill -9 before ranks start", STARTING, None, _template(signal.SIGKILL, True)),
    Fault(
        "template",
        "SIGSTOP before ranks start",
        FORK_SECONDS + STARTING,
        None,
        _template(signal.SIGSTOP, True),
    ),
]
