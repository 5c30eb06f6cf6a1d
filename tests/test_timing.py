"""Where the time of a call goes: compute, communication and bridge are the whole, on one rank and on two."""

from __future__ import annotations

import time

import pytest
import torch

from comfy_xdit.nodes.report import report
from comfy_xdit.protocol.messages import Denoise, Result, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.ranks.timing import Ledger, Timing, ledger
from tests import tiny
from worker.clock import Clock

CPU = torch.device("cpu")
STEPS = 20
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses": ParallelConfig(ulysses_degree=2),
    "ring": ParallelConfig(ring_degree=2),
    "pipefusion": ParallelConfig(pipefusion_degree=2),
    "sharded": ParallelConfig(data_parallel_degree=2, shard_weights=True),
}


def loop(model, previews: bool = True) -> Sample:
    """A guided loop of small steps."""
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    given = tiny.conditions(model.family, model.config, 8)
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    spec = ModelSpec.of(model.file, "transformer")
    return Sample(
        spec, "euler", sigmas, noise * 0, noise, 3.0, given, given, sigmas * 1000, previews=previews
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_are_the_whole_and_who_is_alone_communicates_with_nobody(name, tiny_models):
    group = worker_group(LAYOUTS[name])
    group.call(loop(tiny_models["sd3"]))  # loads
    began = time.perf_counter()
    group.call(loop(tiny_models["sd3"]))
    waited = time.perf_counter() - began

    timing = group.timings["Sample"]
    assert timing.steps == STEPS
    assert timing.compute + timing.communication + timing.bridge == pytest.approx(timing.host)
    assert timing.host <= waited, "within what the host measured from outside"
    assert timing.compute > 0 and 0 < timing.reporting < timing.bridge < timing.host
    if name == "one rank":
        assert timing.communication == 0
    else:
        assert 0 < timing.communication < timing.rank
    told = report(())
    assert f"last Sample: {STEPS} steps of {1000 * timing.host / STEPS:.1f} ms: compute " in told
    assert group.logs and group.logs in told
    assert f"communication {1000 * timing.communication / STEPS:.1f}, bridge " in told


def test_a_single_call_is_split_as_well(tiny_models):
    model, group = tiny_models["sd3"], worker_group(LAYOUTS["sharded"])
    given = tiny.conditions(model.family, model.config, 8)
    call = Denoise(ModelSpec.of(model.file, "transformer"), torch.zeros(1, 16, 16, 16), torch.ones(1), given)
    with ledger.sums() as sums:
        for _ in range(2):
            group.call(call)
            last = group.timings["Denoise"]
            assert (last.steps, last.calls) == (0, 1)
            assert last.communication > 0 and last.reporting == 0
    assert sums["Denoise"].calls == 2 and sums["Denoise"].host > last.host > 0
    assert sums["Denoise"].describe().startswith("2 calls of ")


def test_a_clock_counts_what_is_within_once():
    clock = Clock()
    clock.restart(CPU)
    began = time.perf_counter()
    with clock, clock:
        time.sleep(0.05)
    whole = time.perf_counter() - began
    time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), clock:
        1 / 0  # noqa: B018
    assert 0.05 <= clock.read() < whole + 0.04
    clock.restart(CPU)
    assert clock.read() == 0


def test_a_clock_costs_next_to_nothing():
    """The smallest exchange on gloo takes 180 microseconds (docs/performance.md)."""
    clock, times = Clock(), []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            with clock:
                pass
        times.append((time.perf_counter() - began) / 1000)
    print(f"{1e6 * min(times):.2f} us")
    assert min(times) < 5e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said without a GPU")
def test_what_is_not_measured_is_not_called_nothing():
    clock = Clock()
    clock.restart(torch.device("cuda"))
    with clock:
        pass
    assert clock.read() is None
    timing = Timing.of(2.5, [Result(None, 1.0, None), Result(None, 2.0, None)], 0, 0, 1)
    assert timing.compute == 2.0 and timing.bridge == 0.5
    assert "compute with communication 2000.0 (XDIT_TIMINGS=1 tells them apart)" in timing.describe()
    assert (timing + Timing(1.0, 0.5)).communication is None


def test_the_first_rank_says_where_the_time_of_all_went():
    timing = Timing.of(4.0, [Result(None, 2.9, 0.5, 0.25), Result(None, 3.0, 1.5)], 10, 20, 5)
    assert (timing.rank, timing.communication, timing.compute, timing.bridge) == (3.0, 0.5, 2.25, 1.25)
    assert timing.describe() == "5 steps of 800.0 ms: compute 450.0, communication 100.0, bridge 250.0"


def test_a_ledger_adds_what_happens_within():
    book = Ledger()
    book.note("Load", Timing(9.0, 9.0))
    with book.sums() as outer:
        book.note("Load", Timing(1.0, 0.5, sent=1))
        with book.sums() as inner:
            book.note("Load", Timing(2.0, 1.5, sent=2))
    book.note("Load", Timing(9.0, 9.0))
    assert outer["Load"] == Timing(3.0, 2.0, sent=3, calls=2) and inner["Load"] == Timing(2.0, 1.5, sent=2)
