"""Small JSON objects kept between runs in the user's cache folder, shared by processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = "XDIT_CACHE_DIR"  # environment: the folder, instead of comfy_xdit in the user's cache folder
Check = Callable[[Any], None]  # raises ValueError for what the file may not hold
_log = logging.getLogger(__name__)
_damaged: set[Path] = set()  # said once per file and process


def cache_folder() -> Path:
    """Where this user's files are: XDIT_CACHE_DIR, or comfy_xdit in the cache folder."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfy_xdit"


def read(name: str, check: Check) -> dict[str, Any]:
    """The object in the file `name`. One that is missing or damaged counts as empty; damage is said."""
    file = cache_folder() / name
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        check(held)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if file not in _damaged:
            _damaged.add(file)
            _log.warning("comfy_xdit: %s cannot be read and counts as empty: %s", file, error)
        return {}
    return held


def update(name: str, check: Check, change: Callable[[dict[str, Any]], bool]) -> None:
    """Read the object, `change` it, and replace the file if that returned True.

    All of it under a lock, and the file is replaced as a whole: several processes lose nothing and
    no reader sees half of it. Where nothing can be written there is a warning.
    """
    file = cache_folder() / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            held = read(name, check)
            if change(held):
                _replace(file, held)
    except OSError as error:
        _log.warning("comfy_xdit: %s is not kept up to date: %s", file, error)


def _replace(file: Path, held: dict[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            json.dump(held, opened, indent=1)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "w", encoding="ascii") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield  # closing the file lets go
