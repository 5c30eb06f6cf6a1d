"""Faults of the machine under the host: no descriptors, no memory, no disk, no folder for temporary files."""

from __future__ import annotations

import contextlib
import resource
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks.faults import plan
from benchmarks.faults.scene import EXCEPTION, Fault, Scene, Seen
from comfy_xdit.protocol.messages import Denoise
from comfy_xdit.protocol.spec import ModelSpec
from tests.deeds import address_space, descriptors_left, limited
from tests.faulty_rank import NOTHING

MEBIBYTE = 1 << 20
NUMBERS = 4 * MEBIBYTE  # of a picture above every segment of the jobs'
STARTING = 60.0  # seconds in which ranks start


@contextlib.contextmanager
def _folder_gone():
    """The folder for temporary files is removed after the program has begun to use it."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = str(Path(folder) / "gone")
        try:
            yield
        finally:
            tempfile.tempdir = before


def _start_under(limit: Callable[[], AbstractContextManager[None]]) -> Callable[[Scene], Seen]:
    def inject(scene: Scene) -> Seen:
        scene.group.close()
        plan.forget_moment()

        def draw() -> None:
            with limit():
                scene.jobs.draw(scene.group)

        return scene.see(draw)

    return inject


def _start_with(number: int) -> Callable[[Scene], Seen]:
    """Of descriptors that are left."""
    return _start_under(lambda: descriptors_left(number))


def _send_under(limit: Callable[[], AbstractContextManager[None]]) -> Callable[[Scene], Seen]:
    """A picture larger than any before, which needs a larger segment."""
    message = Denoise(ModelSpec("", "transformer"), torch.zeros(NUMBERS), NOTHING, {})

    def inject(scene: Scene) -> Seen:
        plan.forget_moment()

        def send() -> None:
            with limit():
                scene.group.call(message)

        return scene.see(send)

    return inject


def _files(size: int) -> AbstractContextManager[None]:
    return limited(resource.RLIMIT_FSIZE, size)


def _memory(more: int) -> AbstractContextManager[None]:
    return limited(resource.RLIMIT_AS, address_space() + more)


FAULTS = [
    Fault(
        "machine",
        "64 descriptors at the start",
        STARTING,
        None,
        _start_under(lambda: limited(resource.RLIMIT_NOFILE, 64)),
    ),
    Fault(
        "machine",
        "no descriptor at the start",
        EXCEPTION,
        "ulimit",
        _start_with(0),
    ),
    Fault(
        "machine",
        "6 descriptors at the start",
        EXCEPTION,
        "ulimit",
        _start_with(6),
    ),
    Fault(
        "machine",
        "16 descriptors at the start",
        EXCEPTION,
        "ulimit",
        _start_with(16),
    ),
    Fault(
        "machine",
        "memfd without a page (RLIMIT_FSIZE) at the start",
        EXCEPTION,
        "memory",
        _start_under(lambda: _files(0)),
    ),
    Fault(
        "machine",
        "no memory to map (RLIMIT_AS) at the start",
        STARTING,
        "memory|thread|SIG",
        _start_under(lambda: _memory(MEBIBYTE)),
    ),
    Fault(
        "machine", "the folder for temporary files is gone", EXCEPTION, "TMPDIR", _start_under(_folder_gone)
    ),
    Fault(
        "machine",
        "memfd cannot grow for a message",
        EXCEPTION,
        "no memory to hand a message",
        _send_under(lambda: _files(MEBIBYTE)),
        keeps=True,
    ),
    Fault(
        "machine",
        "mmap fails for a message (RLIMIT_AS)",
        EXCEPTION,
        "no memory to hand a message",
        _send_under(lambda: _memory(MEBIBYTE)),
        keeps=True,
    ),
    Fault(
        "machine",
        "no descriptor for a message",
        EXCEPTION,
        "no memory to hand a message|descriptors",
        _send_under(lambda: descriptors_left(0)),
        keeps=True,
    ),
]
