"""What is to go wrong in which rank, and when it did: files, since ranks must know it before any message.

They lie in a folder that the environment names, which ranks inherit.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "XDIT_FAULTS"  # environment
START, CLOSE = "start", "close"  # where a rank can fail beside the words of messages.py


@dataclass(frozen=True)
class Plan:
    """At `at` (a word of messages.py, START or CLOSE) the rank `rank`, or all, do `do`."""

    at: str
    do: str
    rank: int | None = None
    words: dict[str, Any] = field(default_factory=dict)


def _file(name: str) -> Path:
    return Path(os.environ[FOLDER]) / name


@contextlib.contextmanager
def armed(plan: Plan) -> Iterator[None]:
    """Within, ranks do what `plan` says."""
    forget_moment()
    _file("plan").write_text(json.dumps(asdict(plan)))
    try:
        yield
    finally:
        _file("plan").unlink()


def planned(at: str, rank: int) -> Plan | None:
    """What `rank` is to do here."""
    try:
        plan = Plan(**json.loads(_file("plan").read_text()))
    except FileNotFoundError:
        return None
    return plan if plan.at == at and plan.rank in (None, rank) else None


def forget_moment() -> None:
    """Nothing has gone wrong yet."""
    _file("moment").unlink(missing_ok=True)


def mark_moment() -> None:
    """It goes wrong now. Of several ranks the first counts."""
    with contextlib.suppress(FileExistsError), _file("moment").open("x") as file:
        file.write(str(time.monotonic()))


def moment() -> float | None:
    """When it went wrong (seconds of the monotonic clock, which all processes share); None: not yet."""
    try:
        return float(_file("moment").read_text())
    except FileNotFoundError:
        return None
