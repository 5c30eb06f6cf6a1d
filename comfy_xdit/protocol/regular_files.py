"""Opening a file that a person named: never a wait (a FIFO), always a sentence if it cannot be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from comfy_xdit.protocol.errors import InvalidInput

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def open_regular(file: Path, what: str) -> Iterator[tuple[BinaryIO, int]]:
    """The file, open for reading, and its size in bytes.

    Args:
        what: what it should be, for messages, e.g. "a safetensors file".

    Raises:
        InvalidInput: it is not there, may not be read, or is no regular file.
    """
    try:
        # A FIFO without a writer would otherwise wait for one.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # a NUL in the name
        raise InvalidInput(f"{_shown(file)} cannot be read: {why}; choose {what} that can.") from error
    try:
        status = os.fstat(descriptor)
        check_kind(file, status, what)
    except InvalidInput:
        os.close(descriptor)
        raise
    with open(descriptor, "rb") as stream:
        try:
            yield stream, status.st_size
        except OSError as error:
            raise InvalidInput(f"{_shown(file)} cannot be read: {error.strerror}; check its disk.") from error


def check_kind(file: Path, status: os.stat_result, what: str, folders: bool = False) -> None:
    """Raise InvalidInput unless it is a regular file, or with `folders` a folder; `what` it should be."""
    if stat.S_ISREG(status.st_mode) or (folders and stat.S_ISDIR(status.st_mode)):
        return
    kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "no file")
    raise InvalidInput(f"{_shown(file)} is {kind}; choose {what}.")


def check_there(path: Path, what: str) -> None:
    """Raise InvalidInput unless there is a regular file or a folder at `path`; `what` it should be."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InvalidInput(f"no file or folder at {_shown(path)}; choose {what}.") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"{_shown(path)} cannot be read: {why}; choose {what}.") from error
    check_kind(path, status, what, folders=True)


def _shown(file: Path) -> str:
    return ascii(str(file)) if not str(file).isprintable() else str(file)
