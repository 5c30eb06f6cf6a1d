"""The logs of groups of ranks: JSON lines in the user's cache folder, of bounded size and number.

Kept on purpose: they are read when a group is gone. Each start has a folder, which goes when KEPT later
ones have ended: `rank-0.jsonl` ... are the ranks' own (worker/log.py), `group.jsonl` says how they began and
what ended them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.remembered import cache_folder

KEPT = 8  # folders of groups that have ended
TEXT_CHARACTERS = 32_000  # of one text
_numbers = count(1)
_open: set[Path] = set()  # of groups of this process that run
_log = logging.getLogger(__name__)


class RankLogs:
    """Of one start of so many ranks. Where nothing can be written there are none, and a warning."""

    def __init__(self, world_size: int, **told: Any):
        self.files: tuple[str, ...] = ()
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_numbers):05}"
        self.folder = cache_folder().absolute() / "logs" / name
        _open.add(self.folder)
        try:
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _clean(self.folder.parent)
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            _log.warning("comfy_xdit: the ranks write no logs to %s: %s", self.folder.parent, error)
            return
        self.files = tuple(str(self.folder / f"rank-{rank}.jsonl") for rank in range(world_size))
        self.note("starts", **told)

    @property
    def where(self) -> str:
        """Where to read them, in words; empty where there are none."""
        return f"Logs of these ranks: {self.folder}" if self.files else ""

    def note(self, message: str, **told: Any) -> None:
        """A line about the group."""
        if not self.files:
            return
        short = {k: v[:TEXT_CHARACTERS] if isinstance(v, str) else v for k, v in told.items()}
        line = {"time": time.strftime("%FT%T%z"), "message": message, **short}
        file = self.folder / "group.jsonl"
        with contextlib.suppress(OSError):  # a disk that is full: the person reads the error itself
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def name_in(self, error: BaseException) -> None:
        """Have the text of an error end with where the logs are."""
        if self.files:
            error.args = (f"{error}\n{self.where}", *error.args[1:])

    def close(self, **told: Any) -> None:
        """The group has ended; its logs may go when others have."""
        if self.folder in _open:
            self.note("ended", **told)
            _open.remove(self.folder)


def _clean(root: Path) -> None:
    """Let go of the oldest folders of groups that have ended; names begin with the time."""
    ended = sorted(folder for folder in root.iterdir() if not _runs(folder))
    for folder in ended[: max(0, len(ended) - KEPT)]:
        shutil.rmtree(folder, ignore_errors=True)  # another program may do the same


def _runs(folder: Path) -> bool:
    """Whether a group that writes there may run."""
    pid = folder.name.split("-")[-2:][0]
    if pid == str(os.getpid()) or not pid.isdigit():
        return folder in _open
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
