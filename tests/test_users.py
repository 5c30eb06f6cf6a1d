"""The simulation of many users: against queueing theory, and the pack's own rules. No rank is started."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from benchmarks.users import checks, fleet, plots, studies, tables, theory
from benchmarks.users.__main__ import DOCUMENT
from benchmarks.users.estimates import of_batches, percentile
from benchmarks.users.hosts import FREE, LINGER_SECONDS, Host, Service, Switching
from benchmarks.users.jobs import Job, poisson
from benchmarks.users.machines import PUBLISHED_OVER_TWO
from benchmarks.users.policies import Affinity, SharedQueue
from benchmarks.users.simulation import run
from comfy_xdit.ranks import holders

COUNT = 20_000
CASES = {case.name: case for case in checks.CASES}
SLOW_HOST = {
    "a": Service(1.0, "x", 6.0, "A"),
    "b": Service(1.0, "y", 6.0, "B"),
    "c": Service(1.0, "x", 3.0, "C"),
}


# ---------------------------------------------------------------------- theory


@pytest.mark.parametrize("name", CASES)
def test_waits_are_those_of_the_closed_form(name):
    """Within the confidence interval of 99.9 %; 3 % of the time for the utilisation, some three errors."""
    found = checks.check(CASES[name], seed=5, count=COUNT)
    assert found.holds(), (found.wait, CASES[name].wait)
    assert found.wait.half(0.999) < CASES[name].wait, "an interval that holds everything says nothing"
    assert found.busy == pytest.approx(CASES[name].load, rel=0.03)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("M/D/1", lambda r, s: theory.mm1(r, s)),
        ("M/M/1", lambda r, s: theory.md1(r, s)),
        ("M/M/8 (Erlang C)", lambda r, s: theory.mm1(r / 8, s)),
        ("8 x M/G/1, a queue per host", lambda r, s: theory.mgc(r, s, 0.64, 8)),
    ],
)
def test_the_form_of_another_queue_is_outside(name, wrong):
    case = CASES[name]
    found = checks.check(case, seed=5, count=COUNT)
    assert not found.wait.holds(wrong(case.rate, case.mean), 0.999)


def test_closed_forms_agree_where_they_meet():
    assert theory.erlang_c(1.0, 1.0, 2) == pytest.approx(1 / 3)
    assert theory.mmc(0.7, 1.0, 1) == pytest.approx(theory.mm1(0.7, 1.0)) == pytest.approx(7 / 3)
    assert theory.mg1(0.7, 1.0, 0.0) == pytest.approx(theory.md1(0.7, 1.0))
    assert theory.mgc(0.7, 1.0, 0.64, 1) == pytest.approx(theory.mg1(0.7, 1.0, 0.64))
    with pytest.raises(ValueError, match=r"1\.20 of what 2 can serve"):
        theory.mmc(2.4, 1.0, 2)


def test_switches_take_as_much_of_a_host_as_theory_says():
    busy, load = checks.switched_load(seed=5, count=COUNT)
    assert busy == pytest.approx(load, rel=0.03)


def test_a_request_that_is_lost_ends_the_run():
    class Forgetful(SharedQueue):
        def arrive(self, job: Job) -> Host | None:
            return None if job.number == 50 else super().arrive(job)

    hosts = [Host(0, {"a": Service(1.0)}, 0.0, FREE)]
    with pytest.raises(ArithmeticError, match="1 are left"):
        run(poisson(0.5, {"a": 1.0}, 200, 1), hosts, Forgetful(hosts))


def test_an_estimate_has_a_width_that_shrinks():
    wide, narrow = (of_batches([float(i % 7) for i in range(n)]) for n in (70, 70_000))
    assert narrow.mean == pytest.approx(3.0, abs=1e-3) and narrow.error < wide.error
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    with pytest.raises(ValueError, match="19 values"):
        of_batches([1.0] * 19)


# ---------------------------------------------------------------------- the pack's rules


def test_a_host_lets_go_of_a_model_as_the_pack_does():
    assert LINGER_SECONDS == holders.LINGER_SECONDS
    host = Host(0, SLOW_HOST, 10.0, Switching(rate=2.0, restart=7.0))
    assert host.prepare("a", 0.0) == 7.0 + 3.0
    assert host.prepare("c", 20.0) == 1.5, "another model under the same layout"
    assert host.prepare("a", 30.0) == 0.0, "both fit"
    assert host.prepare("c", 31.0 + LINGER_SECONDS) == 1.5, "its graph was not the last for too long"
    assert host.prepare("b", 100.0) == 7.0 + 3.0, "another layout ends the ranks"
    assert host.prepare("a", 110.0) == 7.0 + 3.0, "and what they held"


def test_room_is_made_by_the_least_recently_used():
    services = {name: Service(1.0, "x", 4.0, name) for name in "abc"}
    host = Host(0, services, 8.0, Switching(rate=4.0, linger=math.inf))
    assert [host.prepare(kind, 0.0) for kind in "abacab"] == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]


def test_layouts_that_are_kept_cost_no_model():
    host = Host(0, SLOW_HOST, 12.0, Switching(rate=2.0, restart=1.0, keeps=True))
    assert [host.prepare(kind, 0.0) for kind in "aba"] == [4.0, 4.0, 1.0]


def test_by_model_the_loaded_goes_first_but_nobody_waits_for_ever():
    hosts = [Host(0, SLOW_HOST, 12.0, Switching(rate=2.0))]
    policy = Affinity(hosts, patience=10.0)
    jobs = [Job(0, 0.0, "a"), Job(1, 1.0, "b"), Job(2, 2.0, "a"), Job(3, 3.0, "a")]
    assert policy.arrive(jobs[0]) is hosts[0]
    hosts[0].prepare("a", 0.0)
    assert [policy.arrive(job) for job in jobs[1:]] == [None, None, None]
    assert policy.free(hosts[0], 5.0) is jobs[2]
    assert policy.free(hosts[0], 12.0) is jobs[1]


# ---------------------------------------------------------------------- the page


def test_the_same_seed_gives_the_same_requests_and_tables():
    def latencies(rate: float = 2.0, size: int = 2) -> list[float]:
        outcome = studies.Fleet(studies.CARD, 16, size).serve(
            fleet.PICTURES, rate / 4, studies.switchings()["today"], count=500
        )
        return [job.latency for job in outcome.jobs]

    assert latencies() == latencies()
    assert latencies() != latencies(rate=1.0)
    first, second = ([j.kind for j in poisson(rate, fleet.PICTURES, 100, 3)] for rate in (1.0, 9.0))
    assert first == second != [j.kind for j in poisson(1.0, fleet.PICTURES, 100, 4)]


def test_the_page_is_what_the_command_writes():
    """Its tables that take no long run; the others come of the same seed in the same way."""
    page = DOCUMENT.read_text(encoding="utf-8")
    gpus = int(re.search(r"The same cut of (\d+) GPUs", page)[1])
    assert gpus == 10_000
    for table in (
        tables.services(), tables.capacities(), tables.in_theory(gpus), tables.over_two_machines(),
        tables.cuts([next(studies.cuts())]).splitlines()[-1],
    ):  # fmt: skip
        assert table in page


def test_more_gpus_per_group_are_faster_and_serve_less():
    found = [fleet.service(studies.CARD, size, "FLUX.1").seconds for size in fleet.SIZES]
    served = [fleet.capacity(studies.CARD, 64, size, fleet.PICTURES) for size in fleet.SIZES]
    assert found == sorted(found, reverse=True) and served == sorted(served, reverse=True)
    with pytest.raises(ValueError, match="does not fit"):
        fleet.service("T4", 1, "FLUX.1")


def test_one_machine_is_predicted_for_those_over_two():
    """The model's form over Ethernet: within 40 % where a layout or a model is known from the source."""
    known = [row for row in PUBLISHED_OVER_TWO if "CogVideoX" not in row.name]
    assert len(known) == 6 and all(abs(row.error) < 0.4 for row in known)


def test_a_plot_is_svg_with_a_line_for_each():
    text = plots.lines("t", "x", "y", {"one": [(1, 2), (10, 20)], "two": [(1, 3)]}, log_x=True)
    tree = ElementTree.fromstring(text)
    assert len(tree.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    with pytest.raises(ValueError, match="above 0"):
        plots.lines("t", "x", "y", {"one": [(1, 0)]})
