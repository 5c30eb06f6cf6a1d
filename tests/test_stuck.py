"""Ranks that hang, and ranks that are only slow; calls that wait, and nobody who waits for them."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from comfy_xdit.protocol.errors import (
    Interrupted,
    InvalidInput,
    OutOfDeviceMemory,
    RemoteError,
    WorkerDied,
    XDiTError,
)
from comfy_xdit.protocol.messages import Forget
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks import deadlines, registry, vigil
from comfy_xdit.ranks.deadlines import Deadlines
from comfy_xdit.ranks.group import WorkerGroup
from tests.faulty_rank import do
from tests.waiting import within

TWO = ParallelConfig(ulysses_degree=2)
SOON = 8.0  # seconds: what is immediate, on a machine that others use too
LONG = 60.0


@pytest.fixture(scope="module")
def pair():
    group = WorkerGroup(TWO, program="tests.faulty_rank")
    yield group
    group.close()


@pytest.fixture
def ready(pair) -> WorkerGroup:
    """Two ranks that have done something, so that no call is the first."""
    pair.call(do("nothing"))
    return pair


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Limits of a second where they are many."""
    monkeypatch.setattr(deadlines, "WAIT_SECONDS", 1.5)
    monkeypatch.setattr(deadlines, "WORK_SECONDS", 1.5)
    monkeypatch.setattr(deadlines, "CANCEL_SECONDS", 1.0)
    monkeypatch.setattr(deadlines, "FIRST_STEP_SECONDS", 1.0)


def took(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def runs(group: WorkerGroup) -> bool:
    return group.call(do("nothing")).seconds >= 0


# ---------------------------------------------------------------------- hung


@pytest.mark.parametrize(
    ("deed", "function"), [("hang", "in hang"), ("hang with the interpreter", "in hang_with_the_interpreter")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_an_error_with_its_stack(ready, impatient, deed, function, rank):
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="stuck") as caught:
        ready.call(do(deed, rank=rank, steps=3))
    assert time.monotonic() - began < 1.5 + SOON
    text = str(caught.value)
    assert f"Where rank {rank} is:" in text and function in text
    assert "in barrier" in text, "the other one waits in a collective"
    assert "in Denoise, after step 3 of 4" in text and "Press Run again: new ranks start" in text
    assert runs(ready)


def test_threads_that_only_look_around_are_no_work(ready, impatient):
    """Each process group has some; those of 25 groups together used more than the border."""
    ready.call(do("join many groups"))
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="nobody has computed"):
        ready.call(do("hang", rank=1))
    assert time.monotonic() - began < 1.5 + SOON


def test_a_stopped_rank_is_told_from_a_slow_one_in_seconds(ready):
    ranks = ready.pids

    def stop(_progress):
        os.kill(ranks[1], signal.SIGSTOP)

    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 1 .*is stuck: its process is stopped"):
        ready.call(do("compute", rank=1, seconds=30.0, steps=1), on_progress=stop)
    assert time.monotonic() - began < deadlines.STOPPED_SECONDS + SOON
    assert runs(ready)


def test_cancel_ends_ranks_that_do_not_answer(ready, impatient, monkeypatch):
    monkeypatch.setattr(deadlines, "WAIT_SECONDS", LONG)
    steps: list[float] = []
    with pytest.raises(Interrupted, match=r"did not stop within [\s\S]*in hang"):
        ready.call(
            do("hang", rank=1, steps=2),
            on_progress=lambda p: steps.append(time.monotonic()),
            interrupted=lambda: len(steps) == 2,
        )
    assert time.monotonic() - steps[-1] < 2.0 + SOON
    assert ready.pids == []
    assert runs(ready)


def test_ctrl_c_waits_for_nobody(ready):
    began: list[float] = []

    def press(_progress):
        began.append(time.monotonic())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ready.call(do("hang", steps=1), on_progress=press)
    assert time.monotonic() - began[0] < SOON
    assert ready.pids == []


def test_an_error_in_the_host_waits_no_longer_than_a_cancel(ready, impatient):
    began: list[float] = []

    def fail(_progress):
        began.append(time.monotonic())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ready.call(do("hang", steps=1), on_progress=fail)
    assert time.monotonic() - began[0] < 2.0 + SOON
    assert runs(ready)


def test_a_rank_whose_own_watch_ends_is_an_error_at_once(ready):
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 1 .*exited with code 18[\s\S]*KeyError: 'missing'"):
        ready.call(do("lose the heartbeat", rank=1))
    assert time.monotonic() - began < SOON
    assert runs(ready)


# ---------------------------------------------------------------------- slow


@pytest.mark.parametrize("deed", ["compute", "compile"])
def test_a_step_many_times_longer_than_any_before_is_not_ended(ready, impatient, deed):
    """It is over every limit that counts seconds alone: 1.5 s without work, and 1.5 s of work."""
    for _ in range(3):
        ready.call(do("compute", seconds=0.15))
    pids = ready.pids
    ready.call(do(deed, rank=1, seconds=5.0))
    assert ready.pids == pids


def test_a_guess_lengthens_limits_and_never_shortens_one():
    learned = Deadlines()
    for longest in (0.0, 2.0, 30.0, 400.0):
        learned.learn("Sample", longest, done=longest > 0)
        without = learned.limits("Sample")
        for guess in (0.001, 1.0, 50.0, 1000.0):
            limits = learned.limits("Sample", guess)
            assert limits.wait >= max(without.wait, deadlines.WAIT_STEPS * guess)
            assert limits.cancel >= max(without.cancel, deadlines.CANCEL_SECONDS + guess)
            assert limits.work >= max(without.work, deadlines.WORK_STEPS * guess)
            assert limits.work >= 20 * max(guess, longest), "a step 20 times as long as thought, or as seen"


def test_a_step_that_was_thought_to_be_short_is_not_ended(ready, impatient):
    ready.call(do("nothing"), guess=0.01)
    pids = ready.pids
    ready.call(do("compute", rank=1, seconds=4.0), guess=0.01)
    assert ready.pids == pids


def test_a_step_that_was_thought_to_be_long_is_waited_for(ready, impatient):
    pids = ready.pids
    ready.call(do("sleep", rank=1, seconds=4.0), guess=4.0)
    assert ready.pids == pids


def test_the_same_step_is_ended_when_nobody_works(ready, impatient):
    with pytest.raises(WorkerDied, match="nobody has computed"):
        ready.call(do("sleep", rank=1, seconds=LONG))


def test_limits_grow_with_the_longest_step_and_first_calls_count_apart():
    learned = Deadlines()
    assert learned.limits("Denoise").wait == deadlines.FIRST_WAIT_SECONDS
    assert learned.limits("Denoise").cancel == deadlines.CANCEL_SECONDS + deadlines.FIRST_STEP_SECONDS
    assert learned.limits("Denoise", guess=100.0).wait == deadlines.WAIT_STEPS * 100.0
    learned.learn("Denoise", 40.0, done=True)  # compiled
    assert learned.limits("Denoise").wait == deadlines.WAIT_SECONDS
    learned.learn("Denoise", 2.0, done=True)
    assert learned.limits("Denoise").cancel == deadlines.CANCEL_SECONDS + 2.0
    learned.learn("Denoise", 100.0, done=True)
    assert learned.limits("Denoise").wait == deadlines.WAIT_STEPS * 100.0
    assert learned.limits("Denoise").work == deadlines.WORK_STEPS * 100.0
    assert learned.limits("Load").wait == deadlines.FIRST_WAIT_SECONDS, "another kind of work"
    learned.restart()
    assert learned.limits("Denoise").cancel == deadlines.CANCEL_SECONDS + 40.0


@pytest.mark.parametrize(("at_work", "is_hung"), [(0, True), (10, True), (3, False), (2, False), (1, False)])
def test_who_is_seen_at_work_now_and_then_is_hung_and_who_is_often_is_not(at_work, is_hung):
    """Ranks that wait for one that hangs at the start poll a file: one look in twenty found them at it."""
    waiting, reached = 0.0, False
    for second in range(1, 200):
        waiting = vigil.waited(waiting, bool(at_work) and second % at_work == 0, 1.0)
        reached |= waiting >= deadlines.WAIT_SECONDS
    assert reached == is_hung


# ---------------------------------------------------------------------- two calls, and an end


@pytest.fixture
def busy(ready):
    """A group in the middle of a call that never ends by itself, and that call."""
    began = threading.Event()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(ready.call, do("hang", steps=1), on_progress=lambda _: began.set())
        assert began.wait(LONG)
        yield ready, call, threads
        ready.close()


def test_a_call_that_waits_for_busy_ranks_can_be_interrupted(busy):
    group, first, threads = busy
    stop = threading.Event()
    second = threads.submit(group.call, do("nothing"), interrupted=stop.is_set)
    stop.set()
    with pytest.raises(Interrupted, match="busy with another call"):
        second.result(SOON)
    assert not first.done() and len(group.pids) == 2, "the first one goes on"


def test_close_ends_a_call_in_progress_and_one_that_waits(busy):
    group, first, threads = busy
    second = threads.submit(group.call, do("nothing"))
    assert took(group.close) < SOON
    for call in (first, second):
        with pytest.raises(WorkerDied, match="ended in mid-call"):
            call.result(SOON)
    assert group.pids == []
    assert runs(group)


def test_asking_for_another_group_waits_for_no_call(busy, monkeypatch):
    group, first, _ = busy
    monkeypatch.setattr(registry, "_groups", {group.parallel: group})
    assert took(lambda: registry.worker_group(ParallelConfig())) < SOON, "nobody holds a model in the first"
    with pytest.raises(WorkerDied, match="ended in mid-call"):
        first.result(SOON)


def test_an_idle_rank_that_is_stopped_costs_no_call(ready):
    stopped = psutil.Process(ready.pids[1])
    stopped.suspend()
    assert within(SOON, lambda: stopped.status() == psutil.STATUS_STOPPED)
    assert ready.tell(Forget()) is None
    ready.call(do("nothing"))
    stopped = psutil.Process(ready.pids[0])
    stopped.suspend()
    assert within(SOON, lambda: stopped.status() == psutil.STATUS_STOPPED)
    assert runs(ready) and stopped.pid not in ready.pids


# ---------------------------------------------------------------------- what the dead leave


def test_an_exception_of_megabytes_keeps_its_rank(ready):
    pids = ready.pids
    with pytest.raises(RemoteError) as caught:
        ready.call(do("fail", kind="ValueError", text="abcdef", times=1_000_000))
    assert caught.value.kind == "ValueError" and "characters left out" in str(caught.value)
    assert len(str(caught.value)) < 100_000
    with pytest.raises(InvalidInput, match="characters left out"):
        ready.call(do("fail", kind="InvalidInput", text="abcdef", times=1_000_000))
    assert ready.pids == pids


def test_an_answer_that_cannot_cross_is_an_error_and_keeps_the_ranks(ready):
    pids = ready.pids
    with pytest.raises(RemoteError, match="set cannot cross the bridge"):
        ready.call(do("answer what cannot cross"))
    assert runs(ready) and ready.pids == pids


def test_an_answer_for_which_there_is_no_memory_is_an_error_and_keeps_the_ranks(ready):
    pids = ready.pids
    with pytest.raises(RemoteError, match=r"no memory for the answer: .*File too large"):
        ready.call(do("answer without room"))
    assert runs(ready) and ready.pids == pids
    ready.close()  # their logs cannot grow either


def test_a_message_for_which_there_is_no_memory_costs_nothing(ready):
    pids, (soft, hard) = ready.pids, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(XDiTError, match="no memory to hand a message to the ranks"):
            ready.call(do("nothing", picture=torch.zeros(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert runs(ready) and ready.pids == pids


@pytest.mark.parametrize(
    ("number", "words"),
    [(40, "ended by signal 40"), (signal.SIGSEGV, "ended by SIGSEGV"), (signal.SIGKILL, "ended by SIGKILL")],
)
def test_an_obituary_says_what_ended_the_rank_and_what_happens_next(ready, number, words):
    with pytest.raises(WorkerDied) as caught:
        ready.call(do("be ended", rank=1, number=int(number), steps=2))
    text = str(caught.value)
    assert "rank 1 (cpu, pid" in text and words in text
    # The last word of a rank that dies may die with it.
    said = r"in Denoise, after step [12] of 3\. Press Run again: new ranks start\."
    assert re.search(said, text)
    assert "Warning" not in text and "deprecated" not in text, "the noise of libraries"
    if number == signal.SIGSEGV:
        assert "in be_ended" in text and "Extension modules" not in text
    assert runs(ready)


def test_a_device_without_memory_is_its_own_error_with_a_remedy(ready):
    pids = ready.pids
    with pytest.raises(OutOfDeviceMemory, match=r"CUDA out of memory[\s\S]*shard_weights"):
        ready.call(do("fail", kind="OutOfMemory", text="CUDA out of memory", times=1))
    assert ready.pids == pids


def test_three_deaths_in_a_row_stop_new_starts_and_say_why():
    group = WorkerGroup(ParallelConfig(), program="tests.faulty_rank")
    try:
        for _ in range(3):
            with pytest.raises(WorkerDied, match="SIGKILL"):
                group.call(do("be ended", number=int(signal.SIGKILL)))
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=r"died 3 times in a row[\s\S]*Unload Models[\s\S]*SIGKILL"):
            group.call(do("nothing"))
        assert time.monotonic() - began < 1.0 and group.pids == [], "nothing was started"
        group.tell(Forget())  # what 'Unload Models' does
        assert runs(group)
    finally:
        group.close()
