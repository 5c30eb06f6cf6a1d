"""What ranks print, and what libraries print there: an anonymous file per rank, of bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Collection

LIMIT = 4 << 20  # bytes; one that is longer when it is looked at loses all but its end
KEPT = 256 << 10
LOOK_SECONDS = 1.0
TAIL_CHARACTERS = 3000
TAIL_BYTES = 64 << 10
# Of a fatal signal: hundreds of names behind the stack that says what happened.
_NOISE = "Extension modules: "


class Output:
    """Of one rank. Goes with the last process that has it open."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        # Shared with the rank: what it writes comes behind what is there, also after a shortening.
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_APPEND)

    def fileno(self) -> int:
        """The descriptor, which a rank is given as its standard output and error."""
        return self._file.fileno()

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.fileno()).st_size

    def text(self, begin: int = 0) -> str:
        """What was written from byte `begin` on, at most the end of it; without what nobody reads."""
        size = self.size
        begin = max(begin if begin <= size else 0, size - TAIL_BYTES)
        text = os.pread(self.fileno(), size - begin, begin).decode(errors="replace")
        lines = [line for line in text.splitlines() if not line.startswith(_NOISE)]
        return "\n".join(lines).strip()[-TAIL_CHARACTERS:]

    def shorten(self) -> None:
        """Let go of the beginning of what is too long. What is written in that moment may go with it."""
        size = self.size
        if size > LIMIT:
            end = os.pread(self.fileno(), KEPT, size - KEPT)
            os.ftruncate(self.fileno(), 0)
            os.write(self.fileno(), end)

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class Shortening:
    """A thread that keeps some outputs short until it is ended."""

    def __init__(self, outputs: Collection[Output]):
        self._outputs, self._ended = outputs, threading.Event()
        self._thread = threading.Thread(target=self._run, name="comfy_xdit outputs", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """From here on none is touched."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            for output in self._outputs:
                with contextlib.suppress(OSError):  # a full disk, which the next look may find emptier
                    output.shorten()
