"""A rank never outlives its host: it ends at once when the host's process is gone.

Two signs, because each can fail alone: the end of standard input (a fork of the host may hold the
pipe open) and the host's process itself (a pidfd; where there is none, the parent's pid).
`PR_SET_PDEATHSIG` is no choice: it fires when the *thread* that spawned the rank ends.
"""

import os
import select
import threading

HOST_GONE = 17  # exit code
PARENT_POLL_MS = 500


def follow(host_pid: int, stdin: int) -> None:
    """End this process when the host ends. Returns at once; a daemon thread watches."""
    threading.Thread(target=_watch, args=(host_pid, stdin), daemon=True, name="lifeline").start()


def _watch(host_pid: int, stdin: int) -> None:
    poll = select.poll()
    poll.register(stdin, select.POLLIN | select.POLLHUP)
    timeout = PARENT_POLL_MS
    if hasattr(os, "pidfd_open"):
        try:
            poll.register(os.pidfd_open(host_pid), select.POLLIN)
            timeout = None
        except ProcessLookupError:
            os._exit(HOST_GONE)
        except OSError:  # a kernel without pidfd: the parent's pid is asked twice a second
            pass
    while os.getppid() == host_pid:
        if poll.poll(timeout):
            break
    os._exit(HOST_GONE)
