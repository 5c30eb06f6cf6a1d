"""A rank never outlives its host: it ends at once when the host's process is gone, or its own watch is.

Two signs, because each can fail alone: the end of standard input (a fork of the host may hold the
pipe open) and the host's process itself (a pidfd; where there is none, the parent's pid).
`PR_SET_PDEATHSIG` is no choice: it fires when the *thread* that spawned the rank ends.
"""

import os
import select
import threading

HOST_GONE = 17  # exit codes
WATCH_GONE = 18
HEARTBEAT, LIFELINE = "heartbeat", "lifeline"  # the threads of the bridge in a rank
PARENT_POLL_MS = 500


def follow(host_pid: int, stdin: int) -> None:
    """End this process when the host ends. Returns at once; a daemon thread watches."""
    threading.excepthook = _end_with_the_watch
    threading.Thread(target=_watch, args=(host_pid, stdin), daemon=True, name=LIFELINE).start()


def _end_with_the_watch(error: threading.ExceptHookArgs) -> None:
    """A rank that is not watched any more ends: its host hears of that at once, and reads why in the log."""
    threading.__excepthook__(error)
    if error.thread is not None and error.thread.name in (HEARTBEAT, LIFELINE):
        os._exit(WATCH_GONE)


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
