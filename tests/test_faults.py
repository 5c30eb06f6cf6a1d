"""What `make faults` and `make soak` measure with: that they see a fault that is missed, and what grows."""

from __future__ import annotations

import os
import signal
import tempfile
from dataclasses import replace

import pytest

from benchmarks.faults import plan
from benchmarks.faults.__main__ import one
from benchmarks.faults.in_ranks import DEATHS, EXCEPTIONS
from benchmarks.faults.jobs import write_models
from benchmarks.faults.scene import Scene, Seen
from benchmarks.faults.soak import Looked, slope, slopes


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("models", "plan", "temporary"):
            (root / name).mkdir()
        patch.setenv(plan.FOLDER, str(root / "plan"))
        patch.setattr(tempfile, "tempdir", str(root / "temporary"))
        write_models(root / "models")
        scene = Scene(root / "models")
        assert scene.next_job() == []
        yield scene
        scene.close()


def test_a_fault_is_told_held_or_missed(scene):
    killed = next(fault for fault in DEATHS if fault.name.startswith("kill -9 of rank 1"))
    patient = replace(killed, bound=60.0)
    row = one(patient, scene)
    assert row.misses == () and "SIGKILL" in row.words and 0 < row.seconds < 60.0
    impossible = replace(killed, bound=0.0, says="SIGTERM", keeps=True)
    missed = "\n".join(one(impossible, scene).misses)
    for words in ("does not say 'SIGTERM'", "s, at most 0.0", "the ranks did not stay"):
        assert words in missed


def test_what_is_left_and_a_raw_error_are_told(scene):
    opened: list[int] = []

    def inject(at: Scene) -> Seen:
        opened.append(os.open(at.jobs.folder / "expected.pt", os.O_RDONLY))
        (at.jobs.folder.parent / "temporary" / "forgotten").touch()
        return Seen(KeyError("raw"), 0.0)

    missed = "\n".join(one(replace(EXCEPTIONS[0], inject=inject), scene).misses)
    os.close(opened[0])
    assert "not an error of ours: KeyError('raw')" in missed
    assert "expected.pt" in missed and "file forgotten in temporary" in missed


def test_a_plan_is_for_its_rank_and_place_and_has_one_moment(scene):
    with plan.armed(plan.Plan("Sample", "signal", 1, {"number": int(signal.SIGKILL)})):
        assert plan.planned("Sample", 0) is None and plan.planned("Load", 1) is None
        assert plan.planned("Sample", 1).words == {"number": 9}
        assert plan.moment() is None
        plan.mark_moment()
        first = plan.moment()
        plan.mark_moment()
        assert plan.moment() == first
    assert plan.planned("Sample", 1) is None


def look(host: int, rank: int, generation: int, age: int) -> Looked:
    return Looked(host << 20, 10, 5, rank << 20, 20, 7, generation, age)


def test_slopes_are_of_the_host_over_runs_and_of_ranks_over_their_age():
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    # The host grows by 1 MiB per run; ranks grow by 2 MiB per run of theirs, and new ones begin anew.
    looks = [look(100 + n, 200 + 2 * (n % 20), n // 20, n % 20) for n in range(60)]
    found = slopes(looks)
    assert found["host: MiB resident"]["slope"] == pytest.approx(100.0)
    assert found["rank: MiB resident"]["slope"] == pytest.approx(200.0)
    assert found["host: descriptors"] == {"least": 10.0, "most": 10.0, "slope": 0.0}
