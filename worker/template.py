"""A process that has imported what a rank needs, and forks: ranks then start without seconds of imports.

It computes nothing and has one thread, so that a fork of it is as good as a new process; where an import
has started threads or opened a GPU's driver it says so, and its host starts ranks the other way. What a
request holds: docs/decisions/017-ranks-from-a-template.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import socket
import sys
from pathlib import Path

REQUEST_BYTES = 1 << 20
MOST_DESCRIPTORS = 8
DRIVER = "libcuda.so"  # a process that was forked with an open driver cannot use it


def main() -> None:
    """Serve forks until the host is gone. In a fork: return from serving, and be that rank."""
    host = socket.socket(fileno=int(sys.argv[1]))
    _import()
    gc.collect()
    gc.freeze()  # a collection in a rank would write to, and so copy, every page
    host.send(json.dumps({"unfit": _unfit()}).encode())
    program = _serve(host, int(sys.argv[2]))
    sys.argv[1:] = []
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _import() -> None:
    # What is missing is for a rank to say, which has a host that hears it.
    with contextlib.suppress(ImportError):
        import worker.engine  # noqa: F401
        from worker.parallel import import_xfuser

        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # it asks a GPU what it is, which opens the driver
            import_xfuser()


def _unfit() -> str:
    """Why a fork of this process would not be as a new one; empty where it is."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"an import has started {threads - 1} threads"
    return f"an import has opened {DRIVER}" if DRIVER in Path("/proc/self/maps").read_text() else ""


def _serve(host: socket.socket, host_pid: int) -> str:
    """Fork at every request. Returns, in a fork only, the module to run."""
    poll = select.poll()
    poll.register(host, select.POLLIN | select.POLLHUP)
    poll.register(os.pidfd_open(host_pid), select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        line, descriptors = b"", []
        if ready == [host.fileno()]:
            line, descriptors, _, _ = socket.recv_fds(host, REQUEST_BYTES, MOST_DESCRIPTORS)
        if not line:  # the host has let go of this process, or is gone
            os._exit(0)
        request = json.loads(line)
        pid = _fork_for_the_host()
        if pid == 0:
            host.close()
            _become(request, descriptors)
            return request["program"]
        for descriptor in descriptors:
            os.close(descriptor)
        host.send(json.dumps({"pid": pid}).encode())


def _fork_for_the_host() -> int:
    """Fork a child of the HOST, which reaps it: 0 in the child, its pid in this process.

    The process between ends at once; an orphan goes to the nearest subreaper above, which the host is
    meanwhile (prctl(2), PR_SET_CHILD_SUBREAPER).
    """
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.close(writer)
            return 0
        os.write(writer, str(child).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        pid = int(answer.read())
    os.waitpid(between, 0)
    return pid


def _become(request: dict[str, object], descriptors: list[int]) -> None:
    """Take on what a new process would have been given: session, environment, descriptors."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    stdin, log, *others = descriptors
    moves = list(zip((stdin, log, log, *others), (0, 1, 2, *request["descriptors"]), strict=True))
    beyond = max(number for move in moves for number in move) + 1
    copies = [(fcntl.fcntl(source, fcntl.F_DUPFD, beyond), target) for source, target in moves]
    for descriptor in descriptors:
        os.close(descriptor)
    for copy, target in copies:
        os.dup2(copy, target)
        os.close(copy)


if __name__ == "__main__":
    main()
