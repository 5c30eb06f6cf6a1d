"""The host's side of the template that ranks are forked from; see worker/template.py.

A rank that is forked is a child of this process as one that is spawned is: watched, signalled and reaped
by its pid alike.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from comfy_xdit import ROOT
from comfy_xdit.ranks.environment import VISIBLE, template_environment
from comfy_xdit.ranks.output import Output

FORK = "XDIT_FORK_RANKS"  # 1: also on GPUs. 0: never
IMPORT_SECONDS = 180.0  # for all imports, on a busy machine; after that ranks start without it
FORK_SECONDS = 20.0
MOST_FAILURES = 2  # then this host starts ranks as it always can
POLL_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_REPLY_BYTES = 4096
# Of the process that imports, not of its forks: no threads, and a package that asks for GPUs is answered by
# NVML, which leaves the driver closed.
_IMPORTS = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class NoTemplate(Exception):
    """Ranks cannot be forked here, or not now."""


class Forked:
    """A rank that was forked: the part of subprocess.Popen that its owner needs."""

    def __init__(self, pid: int, stdin: IO[bytes]):
        self.pid, self.stdin = pid, stdin
        self._descriptor = os.pidfd_open(pid)  # also of one that has died already: nobody else reaps it
        self._code: int | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self._code is None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("a rank", timeout)
            with self._lock:
                if self._code is None:
                    self._code = _reaped(self.pid)
                    os.close(self._descriptor)
        return self._code

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has been reaped."""
        with self._lock, contextlib.suppress(ProcessLookupError):  # reaped by another part of this process
            if self._code is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _reaped(pid: int) -> int:
    """The exit code of a child that has ended; 0, as of Popen, where another part has reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


class Template:
    """One process, in the environment of a rank but for what differs from rank to rank."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self._lock = threading.Lock()
        self._host, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._host.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.template", str(theirs.fileno()), str(os.getpid())],
                cwd=ROOT,
                env=self.environment | _IMPORTS,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            undo.pop_all()
        self._is_ready = False

    def start(
        self,
        program: str,
        environment: Mapping[str, str],
        log: Output,
        descriptors: Sequence[int],
        waiting: Callable[[], None],
    ) -> Forked:
        """Fork a process that runs the module `program`.

        Args:
            log: its standard output and error.
            descriptors: what it inherits, under the same numbers.
            waiting: called about 20 times a second while the template imports; what it raises ends the wait.

        Raises:
            NoTemplate: this one cannot, and will not the next time.
        """
        with self._lock:
            self._await_imports(waiting)
            request = {
                "program": program,
                "environment": dict(environment),
                "descriptors": list(descriptors),
            }
            reader, writer = os.pipe()
            with open(reader, "rb"), contextlib.ExitStack() as undo:
                stdin = undo.enter_context(os.fdopen(writer, "wb"))
                pid = self._forked(json.dumps(request).encode(), [reader, log.fileno(), *descriptors])
                forked = Forked(pid, stdin)
                undo.pop_all()
            return forked

    def _forked(self, request: bytes, descriptors: list[int]) -> int:
        """The pid of a new rank.

        Raises:
            NoTemplate: there is none.
        """
        try:
            with _subreaper():
                socket.send_fds(self._host, [request], descriptors)
                return self._reply(FORK_SECONDS, lambda: None)["pid"]
        except OSError as error:
            raise NoTemplate(str(error)) from error

    def close(self) -> None:
        """End the process; ranks that were forked of it go on."""
        self._host.close()
        self._process.kill()
        self._process.wait()

    def _await_imports(self, waiting: Callable[[], None]) -> None:
        if not self._is_ready:
            why = self._reply(IMPORT_SECONDS, waiting)["unfit"]
            if why:
                raise NoTemplate(why)
            self._is_ready = True

    def _reply(self, seconds: float, waiting: Callable[[], None]) -> dict[str, object]:
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._host, select.POLLIN)
        while not poll.poll(POLL_SECONDS * 1000):
            waiting()
            if time.monotonic() > deadline:
                raise NoTemplate(f"the template of the ranks did not answer within {seconds:g} s")
        line = self._host.recv(_REPLY_BYTES)
        if not line:
            raise NoTemplate("the template of the ranks ended")
        return json.loads(line)


_current: Template | None = None
_lock = threading.Lock()
_reaping = threading.Lock()
_log = logging.getLogger(__name__)
_failures = 0


def fork(
    program: str,
    environment: Mapping[str, str],
    log: Output,
    descriptors: Sequence[int],
    waiting: Callable[[], None],
) -> Forked | None:
    """A rank forked of this process's template, which starts with the first; None where there can be none.

    Args: as of `Template.start`.
    """
    global _failures
    if not _may_fork(environment):
        return None
    template = _template(template_environment(environment))
    try:
        return template.start(program, environment, log, descriptors, waiting)
    except NoTemplate as reason:
        close_template()
        _failures += 1
        _log.warning("comfy_xdit: ranks start with Python and all imports, which takes longer: %s", reason)
        return None


def close_template() -> None:
    """End the template, if there is one."""
    global _current
    with _lock:
        template, _current = _current, None
    if template is not None:
        template.close()


atexit.register(close_template)


def _may_fork(environment: Mapping[str, str]) -> bool:
    """On a GPU only where a person asks for it: it has not been run on one yet."""
    asked = os.environ.get(FORK, "")
    if (
        _failures >= MOST_FAILURES
        or asked == "0"
        or sys.platform != "linux"
        or (environment[VISIBLE] and asked != "1")
    ):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # an old kernel, or a container that forbids it
        return False
    return True


def _template(environment: dict[str, str]) -> Template:
    """The one of this environment; another one is ended."""
    global _current
    with _lock:
        if _current is None or _current.environment != environment:
            if _current is not None:
                _current.close()
            _current = Template(environment)
        return _current


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Orphans below this process become its children meanwhile: what the template forks is one."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = ctypes.c_int()
    with _reaping:
        if prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) or prctl(
            _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
        ):
            raise NoTemplate(os.strerror(ctypes.get_errno()))
        try:
            yield
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
