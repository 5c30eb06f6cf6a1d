"""Ranks that leave together when one fails: real gloo between two threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from worker.parallel.lockstep import Lockstep, OutOfStep
from worker.parallel.mesh import Mesh

SECONDS = timedelta(seconds=20)
PART = torch.zeros(1, 2, 4)


def both(*deeds: Callable[[Lockstep], Any]) -> list[BaseException | None]:
    """What each of two ranks raises that does its own deed."""
    store, raised = dist.HashStore(), [None] * len(deeds)

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(dist.PrefixStore("lockstep", store), rank, len(deeds), SECONDS)

        def differ(word: str) -> bool:
            number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
            span = torch.tensor([number, -number])
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            group.allreduce([span], options).wait()
            return bool(span.sum() != 0)

        mesh = Lockstep.of(Mesh(ulysses=len(deeds), rank=rank), differ)
        try:
            with mesh.together():
                deeds[rank](mesh)
        except (OutOfStep, ValueError) as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(deeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS.total_seconds())
    assert not any(thread.is_alive() for thread in threads), "a rank waits for one that has failed"
    return raised


def nothing(_mesh: Lockstep) -> None:
    """Ends at once."""


def fail(_mesh: Lockstep) -> None:
    raise ValueError("this rank alone")


def gather(mesh: Lockstep) -> None:
    mesh.gather(PART, [2, 2], 1)


def add_up(mesh: Lockstep) -> None:
    mesh.sum(PART)


def test_ranks_that_do_the_same_end_well():
    assert both(nothing, nothing) == [None, None]


@pytest.mark.parametrize("other", [gather, add_up, nothing])
def test_a_rank_that_fails_alone_frees_the_others(other):
    waiting, failed = both(other, fail)

    assert isinstance(failed, ValueError)
    assert isinstance(waiting, OutOfStep)


def test_ranks_that_fail_alike_say_their_own_reason():
    assert [type(error) for error in both(fail, fail)] == [ValueError, ValueError]


@pytest.mark.parametrize(("one", "other"), [(gather, add_up), (gather, nothing)])
def test_other_exchanges_are_no_deadlock(one, other):
    assert [type(error) for error in both(one, other)] == [OutOfStep, OutOfStep]
