"""Who still holds a model of the ranks. What nobody holds, the ranks let go after a while.

ComfyUI drops a node's output when the graph changes, and makes it again when the graph changes
back: a model that nobody holds therefore stays for LINGER_SECONDS, and going back costs nothing.
The ranks are told by a thread of this module. A handle may be collected in any thread at any
moment, in the middle of a call to the ranks too: all its finaliser does is put a word in a queue.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from comfy_xdit.protocol.errors import XDiTError
from comfy_xdit.protocol.messages import Forget
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ControlNet, ModelSpec

LINGER_SECONDS = 60.0
RELEASE_SECONDS = 5.0  # how long ComfyUI's own thread waits for ranks that are busy
_log = logging.getLogger(__name__)


class Group(Protocol):
    """The ranks of one layout, as far as they are told here."""

    parallel: ParallelConfig

    def tell(self, message: Any) -> Any: ...


class Names(Protocol):
    """What knows which tensors the ranks keep for a handle."""

    def names(self) -> tuple[int | str, ...]: ...


@dataclass(frozen=True)
class _Dropped:
    """A handle that is gone, and when that costs the ranks its model."""

    parallel: ParallelConfig
    spec: ModelSpec | ControlNet
    names: tuple[int | str, ...]
    due: float


class Holders:
    """Counts handles, and tells the groups what to forget.

    Args:
        groups: the groups there are.
    """

    def __init__(self, groups: Callable[[], Iterable[Group]]):
        self._groups = groups
        self._lock = threading.Lock()
        self._count: Counter[tuple[ParallelConfig, ModelSpec | ControlNet]] = Counter()
        self._lingering: list[_Dropped] = []
        # Reentrant, unlike Queue: a finaliser may run in the middle of another put.
        self._words: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def hold(
        self, handle: Any, parallel: ParallelConfig, spec: ModelSpec | ControlNet, sent: Names | None
    ) -> None:
        """`handle` needs `spec` in the ranks of `parallel` as long as it lives."""
        with self._lock:
            self._count[parallel, spec] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="comfy_xdit holders", daemon=True)
                self._thread.start()
        weakref.finalize(handle, self._words.put, (parallel, spec, sent)).atexit = False

    def is_held(self, parallel: ParallelConfig) -> bool:
        """Whether any handle of a model in the ranks of `parallel` lives."""
        words = []
        with contextlib.suppress(queue.Empty):
            while True:
                words.append(self._words.get_nowait())
        for word in words:
            self._take(word)
        if words:
            self._words.put(None)  # the thread waits with a deadline that may be too late now
        with self._lock:
            return any(
                count and layout == parallel and isinstance(spec, ModelSpec)
                for (layout, spec), count in self._count.items()
            )

    def release_all(self) -> None:
        """Have every rank let go of every model now; a handle that is used again loads again."""
        if self._thread is None:
            return
        done = threading.Event()
        self._words.put(done)
        done.wait(RELEASE_SECONDS)

    def _serve(self) -> None:
        while True:
            with self._lock:
                due = min((dropped.due for dropped in self._lingering), default=None)
            try:
                word = self._words.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except queue.Empty:
                word = None
            self._take(word)
            self._forget_overdue()

    def _take(self, word: Any) -> None:
        if isinstance(word, threading.Event):
            for group in self._groups():
                _tell(group, Forget())
            word.set()
        elif word is not None:
            parallel, spec, sent = word
            names = () if sent is None else sent.names()
            with self._lock:
                self._count[parallel, spec] -= 1
                self._count += Counter()  # keeps what is above zero
                self._lingering.append(_Dropped(parallel, spec, names, time.monotonic() + LINGER_SECONDS))

    def _forget_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [dropped for dropped in self._lingering if dropped.due <= now]
            self._lingering = [dropped for dropped in self._lingering if dropped.due > now]
            later = {(dropped.parallel, dropped.spec) for dropped in self._lingering} | self._count.keys()
        for group in self._groups():
            mine = [dropped for dropped in overdue if dropped.parallel == group.parallel]
            specs = {d.spec for d in mine if (d.parallel, d.spec) not in later}
            names = tuple(name for d in mine for name in d.names)
            if specs or names:
                _tell(group, Forget(tuple(specs), names))


def _tell(group: Group, message: Forget) -> None:
    """Tell a group that runs. One that fails has lost its memory already, and the next call says why."""
    try:
        group.tell(message)
    except XDiTError as error:
        _log.warning("comfy_xdit: the ranks could not let go of a model: %s", error)
