"""Deaths in a row: after a few, new ranks are not started again and again for the same end."""

from __future__ import annotations

import time

from comfy_xdit.protocol.errors import WorkerDied

IN_A_ROW = 3
PAUSE_SECONDS = 60.0  # ends a queue of equal prompts; short for who has changed something


class Deaths:
    """What the ranks of a layout died of, since they last did what they died of."""

    def __init__(self) -> None:
        self._kind = ""
        self._causes: list[str] = []
        self._last = 0.0

    def note(self, kind: str, error: WorkerDied) -> None:
        """They died in a call of this `kind`."""
        self._kind, self._last = kind, time.monotonic()
        self._causes.append(str(error).splitlines()[0])

    def survived(self, kind: str) -> None:
        """A call of this `kind` has come to an end: if it was the one they died of, that is over."""
        if kind == self._kind:
            self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._kind, self._causes = "", []

    def check(self) -> None:
        """Raise WorkerDied for a while when they died too often in a row."""
        left = self._last + PAUSE_SECONDS - time.monotonic()
        if len(self._causes) < IN_A_ROW or left <= 0:
            return
        causes = "\n".join(f"- {cause}" for cause in self._causes[-IN_A_ROW:])
        raise WorkerDied(
            f"the ranks died {len(self._causes)} times in a row, so no new ones are started for another "
            f"{left:.0f} s, or until 'Unload Models' is pressed. Change what they died of first (a smaller "
            f"picture, sharded weights, another layout or model):\n{causes}"
        )
