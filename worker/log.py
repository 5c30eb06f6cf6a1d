"""A rank's log: JSON lines in a file of bounded size that the host names.

How long each command took and how it ended, errors whole, and what libraries hand to Python's root logger
from warnings on. No prompt and no picture, but where an error quotes one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from typing import Any

LIMIT = 256 << 10  # bytes; as much again is kept of what was before
TEXT_CHARACTERS = 32_000  # of one text

_log = logging.getLogger("comfy_xdit.rank")


def begin(path: str, rank: int) -> None:
    """Log to the file at `path` from here on; "" is nowhere."""
    if not path:
        return
    try:
        handler = _File(path, maxBytes=LIMIT, backupCount=1)
    except OSError as error:
        print(f"rank {rank} writes no log: {error}", file=sys.stderr)
        return
    handler.setFormatter(_Lines(rank))
    logging.getLogger().addHandler(handler)
    _log.setLevel(logging.INFO)


def note(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line with these fields: plain data."""
    _log.log(level, message, extra={"fields": fields})


class _Lines(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, rank: int):
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Texts of any length are cut."""
        line = {
            "time": self.formatTime(record, self.datefmt),
            "level": record.levelname,
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        short = {k: v[:TEXT_CHARACTERS] if isinstance(v, str) else v for k, v in line.items()}
        return json.dumps(short)


class _File(RotatingFileHandler):
    """For the user's eyes only; the first error, of a full disk say, ends it."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging in the place of raising."""
        print(f"{self.baseFilename} is written no more: {sys.exc_info()[1]}", file=sys.stderr)
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # of what could not be written
            self.close()
