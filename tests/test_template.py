"""Ranks that are forked: children of this process as spawned ones are, and spawned where that cannot be."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from comfy_xdit.protocol.errors import Interrupted
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks import template
from comfy_xdit.ranks.environment import rank_environment, template_environment
from comfy_xdit.ranks.group import WorkerGroup
from tests.faulty_rank import do

TWO = ParallelConfig(ulysses_degree=2)
SECONDS = 60.0


@pytest.fixture
def group(monkeypatch) -> Iterator[WorkerGroup]:
    monkeypatch.setattr(template, "_failures", 0)
    group = WorkerGroup(TWO, program="tests.faulty_rank")
    yield group
    group.close()


def templates() -> list[int]:
    """Those of this process; a rank that is forked has the command line of its template."""
    children = psutil.Process().children()
    return [c.pid for c in children if "worker.template" in c.cmdline() and not c.name().startswith("xdit")]


def is_forked(pid: int) -> bool:
    return "worker.template" in psutil.Process(pid).cmdline()


def wait_for_the_end(pid: int) -> None:
    """Without reaping it, which is its owner's."""
    with contextlib.suppress(ChildProcessError):  # its owner already has
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_rank_that_somebody_else_reaped_is_at_its_end():
    with subprocess.Popen(["sleep", "60"]) as process:
        forked = template.Forked(process.pid, process.stdin)
        process.kill()
        process.wait()
        forked.kill()
        assert forked.wait(SECONDS) == 0


def test_a_forked_rank_is_a_child_of_the_host_in_a_session_of_its_own(group):
    group.call(do("nothing"))
    for rank, pid in enumerate(group.pids):
        process = psutil.Process(pid)
        assert is_forked(pid) and process.ppid() == os.getpid() and os.getsid(pid) == pid
        assert process.name() == f"xdit rank {rank}"
        assert process.num_threads() > 1, "the lifeline and the heartbeat"


def test_another_start_is_from_the_same_template(group):
    group.call(do("nothing"))
    pids, before = group.pids, templates()
    os.kill(pids[1], signal.SIGKILL)
    wait_for_the_end(pids[1])
    group.call(do("nothing"))
    assert len(before) == 1 and templates() == before
    assert set(pids).isdisjoint(group.pids) and all(map(is_forked, group.pids))


def test_the_end_of_the_template_harms_no_rank_and_no_start(group):
    group.call(do("nothing"))
    pids = group.pids
    (pid,) = templates()
    os.kill(pid, signal.SIGKILL)
    wait_for_the_end(pid)
    group.call(do("nothing"))
    assert group.pids == pids
    group.close()
    group.call(do("nothing"))
    assert [is_forked(pid) for pid in group.pids] == [False, True], "the next rank has a template again"


def test_ranks_are_spawned_where_a_person_says_so(group, monkeypatch):
    monkeypatch.setenv(template.FORK, "0")
    group.call(do("nothing"))
    assert not any(map(is_forked, group.pids))


def test_an_interrupt_does_not_wait_for_the_imports(group):
    template.close_template()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        group.call(do("nothing"), interrupted=lambda: time.monotonic() > began + 0.2)
    assert group.pids == []
    group.call(do("nothing"))
    assert all(map(is_forked, group.pids)), "the imports went on meanwhile"


def test_what_no_fork_can_have_is_given_to_its_template(monkeypatch):
    monkeypatch.setenv("XDIT_CACHE_DIR", "somewhere")
    of_rank = rank_environment(1, ("cpu", "cpu"))
    assert of_rank["XDIT_CACHE_DIR"] == "somewhere" and of_rank["RANK"] == "1"
    shared = template_environment(of_rank)
    assert not {"XDIT_CACHE_DIR", "RANK", "OMP_NUM_THREADS"} & set(shared)
    assert shared["CUDA_VISIBLE_DEVICES"] == "" and shared["PYTHONPATH"] == of_rank["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert template_environment(rank_environment(1, ("cpu", "cpu"))) != shared
    on_gpus = rank_environment(1, ("cuda:0", "cuda:1"), {})
    assert "CUDA_VISIBLE_DEVICES" not in template_environment(on_gpus)


def test_a_process_with_threads_or_an_open_driver_is_no_template(monkeypatch):
    from worker import template as forking

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert "threads" in forking._unfit()
    stop.set()
    thread.join()
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    assert forking._unfit() == ""
    monkeypatch.setattr(Path, "read_text", lambda _: "7f00-7f01 r-xp /usr/lib/libcuda.so.550")
    assert "libcuda.so" in forking._unfit()


def test_ranks_on_gpus_are_forked_only_when_asked_for(monkeypatch):
    of_gpu = rank_environment(0, ("cuda:0",), {})
    monkeypatch.delenv(template.FORK, raising=False)
    monkeypatch.setattr(template, "_failures", 0)
    assert not template._may_fork(of_gpu)
    monkeypatch.setenv(template.FORK, "1")
    assert template._may_fork(of_gpu)


HOST = """
import sys
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.group import WorkerGroup
from tests.faulty_rank import do
import psutil
group = WorkerGroup(ParallelConfig(), program="tests.faulty_rank")
group.call(do("nothing"))
print(*(child.pid for child in psutil.Process().children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_the_template_ends_with_its_host(end):
    with subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        processes = [psutil.Process(int(pid)) for pid in host.stdout.readline().split()]
        assert len(processes) == 2, "a rank and its template"
        if end is not None:
            host.send_signal(end)
        host.stdin.close()
        _gone, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert alive == []
