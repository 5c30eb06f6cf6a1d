"""Starts without descriptors, memory or a folder for files: an error with a remedy, and nothing is left."""

from __future__ import annotations

import gc
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from comfy_xdit.protocol.errors import OutOfDeviceMemory, WorkerDied, XDiTError
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Host
from comfy_xdit.protocol.shared_memory import Segment
from comfy_xdit.ranks.group import WorkerGroup
from tests.deeds import address_space, descriptors_left, limited
from tests.faulty_rank import do


@contextmanager
def folder_gone() -> Iterator[None]:
    """What `tempfile` remembers is not there any more."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(tempfile, "tempdir", str(Path(folder) / "gone"))
        yield


@pytest.fixture(autouse=True, scope="module")
def _store_was_used() -> None:
    """Its library keeps two descriptors of the first time."""
    Host(1, os.getpid(), {}).close()


def what_there_is() -> tuple[int, int]:
    gc.collect()
    here = psutil.Process()
    return here.num_fds(), len(here.children(recursive=True))


def is_no_more_than(before: tuple[int, int]) -> bool:
    """Nothing more; less where what an earlier test used went meanwhile."""
    return all(now <= then for now, then in zip(what_there_is(), before, strict=True))


@pytest.mark.parametrize(
    ("shortage", "remedy"),
    [(lambda n=n: descriptors_left(n), r"may open \d+ files.*ulimit -n") for n in (0, 2, 4, 6, 8, 10, 16, 30)]
    + [
        (lambda: limited(resource.RLIMIT_FSIZE, 0), r"memory.*free some"),
        (lambda: limited(resource.RLIMIT_AS, address_space() + (8 << 20)), r"memory.*free some"),
        (folder_gone, r"TMPDIR"),
    ],
)
def test_a_start_for_which_something_is_short_says_what_and_leaves_nothing(shortage: Callable, remedy: str):
    group = WorkerGroup(ParallelConfig(ulysses_degree=2), program="tests.faulty_rank")
    before = what_there_is()
    try:
        with pytest.raises(XDiTError, match=remedy) as caught, shortage():
            group.call(do("nothing"))
        assert "the ranks could not be started" in str(caught.value)
        assert not isinstance(caught.value, WorkerDied), "nothing has died, so that it counts as no death"
        assert group.pids == []
    finally:
        group.close()
    del caught  # whose frames hold what is to be gone
    assert is_no_more_than(before)


def test_ranks_start_when_there_is_enough_again():
    group = WorkerGroup(ParallelConfig(), program="tests.faulty_rank")
    for _ in range(4):
        with pytest.raises(XDiTError, match="could not be started"), descriptors_left(0):
            group.call(do("nothing"))
    try:
        assert group.call(do("nothing")).value is None
    finally:
        group.close()


def test_a_message_that_a_rank_has_no_memory_for_is_an_error_and_no_end():
    group = WorkerGroup(ParallelConfig(), program="tests.faulty_rank")
    try:
        group.call(do("keep little memory"))
        pids = group.pids
        with pytest.raises(OutOfDeviceMemory, match=r"no memory for the message[\s\S]*What needs less"):
            group.call(do("nothing", given=torch.zeros(64 << 20)))
        assert group.call(do("nothing")).value is None
        assert group.pids == pids
    finally:
        group.close()


def test_a_host_that_cannot_have_all_its_segments_keeps_none(monkeypatch):
    made: list[Segment] = []

    make = Segment.__init__

    def scarce(self, *descriptor):
        if len(made) == 2:
            raise OSError(24, "Too many open files")
        make(self, *descriptor)
        made.append(self)

    before = what_there_is()
    monkeypatch.setattr(Segment, "__init__", scarce)
    with pytest.raises(OSError, match="Too many"):
        Host(2, os.getpid(), {})
    made.clear()
    assert is_no_more_than(before)
