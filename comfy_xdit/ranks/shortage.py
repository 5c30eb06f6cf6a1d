"""What the machine has not, in the words of the system, and what to do about it."""

from __future__ import annotations

import errno
import resource
import tempfile

from comfy_xdit.protocol.errors import XDiTError

_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_MEMORY = (errno.ENOMEM, errno.EAGAIN, errno.EFBIG)
_FOLDER = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES, errno.EROFS)


def cannot_start(error: OSError | RuntimeError | MemoryError) -> XDiTError:
    """What to say when processes, and what they need, could not be made."""
    return XDiTError(f"the ranks could not be started: {error}. {_remedy(error)}".strip())


def _remedy(error: OSError | RuntimeError | MemoryError) -> str:
    number = getattr(error, "errno", None)
    if number in _DESCRIPTORS or "too many open files" in str(error).lower():  # of the store: only words
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"This process may open {limit} files, and ranks need some ten each: raise that limit "
            "(ulimit -n 4096) in the shell that starts ComfyUI."
        )
    if number in _MEMORY or isinstance(error, MemoryError) or "new thread" in str(error):
        return (
            "The system gives this process no more memory or threads: free some of the machine's, or raise "
            "the limits ComfyUI was started with (ulimit -a shows them)."
        )
    if number in _FOLDER:
        return (
            f"Ranks keep their logs in the folder for temporary files, {tempfile.tempdir}: set TMPDIR to a "
            "folder that exists and has room, and start ComfyUI again."
        )
    return ""
