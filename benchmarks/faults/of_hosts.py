"""Faults of hosts: however one ends, nothing of it is left, and the next one starts and draws the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from benchmarks.faults.host_process import HostProcess
from benchmarks.faults.scene import DEATH, Fault, Scene, Seen

ORDERLY = 8.0  # seconds in which ranks that are asked to end have ended


class Left(Exception):
    """What a host that has ended left behind."""


def _ending(command: str, end: Callable[[HostProcess], None]) -> Callable[[Scene], Seen]:
    """How long the ranks outlive a host that has drawn, is told `command` and is then ended in mid-run."""

    def inject(scene: Scene) -> Seen:
        host = HostProcess(scene.jobs.folder)
        try:
            said = host.report()
            host.tell(command)
            child = None if command == "end" else host.report()["child"]
            end(host)
            seconds, left = host.ended(said["ranks"])
            if child is not None:  # of the host's, not ours
                os.kill(child, signal.SIGKILL)
            left += [] if said["equal"] else ["another picture than the hosts before it drew"]
            return Seen(Left(", ".join(left)) if left else None, seconds)
        except RuntimeError as error:  # it did not even start
            return Seen(error, 0.0)
        finally:
            host.close()

    return inject


def _sent(number: int) -> Callable[[HostProcess], None]:
    return lambda host: os.kill(host.pid, number)


def _closed_files(scene: Scene) -> Seen:
    """A host without standard files: descriptors 0 to 2 are its own then."""
    began, host = time.monotonic(), HostProcess(scene.jobs.folder, closed=True)
    try:
        said = host.report()
        host.tell("end")
        _, left = host.ended(said["ranks"])
        wrong = [] if said["equal"] else ["another picture"]
        return Seen(Left(", ".join(left + wrong)) if left + wrong else None, time.monotonic() - began)
    except RuntimeError as error:
        return Seen(error, time.monotonic() - began)
    finally:
        host.close()


def _nothing(_host: HostProcess) -> None: ...


STARTING = 60.0
FAULTS = [
    Fault("host", "kill -9", DEATH, None, _ending("run", _sent(signal.SIGKILL))),
    Fault(
        "host",
        "kill -9, with a child that has all its descriptors",
        DEATH,
        None,
        _ending("fork", _sent(signal.SIGKILL)),
    ),
    Fault("host", "SIGTERM", DEATH, None, _ending("run", _sent(signal.SIGTERM))),
    Fault("host", "SIGHUP", DEATH, None, _ending("run", _sent(signal.SIGHUP))),
    Fault("host", "Ctrl-C (SIGINT)", ORDERLY, None, _ending("run", _sent(signal.SIGINT))),
    Fault(
        "host",
        "replaced by another program (execv), as a restart does",
        DEATH,
        None,
        _ending("exec", _nothing),
    ),
    Fault("host", "an exception nobody expects", ORDERLY, None, _ending("raise", _nothing)),
    Fault("host", "the program ends by itself", ORDERLY, None, _ending("end", _nothing)),
    Fault("host", "standard input, output and error closed", STARTING, None, _closed_files),
]
