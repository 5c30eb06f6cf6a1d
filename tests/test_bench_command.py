"""`bench`: a model the ranks know, times that the planner finds again, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from comfy_xdit import bench, cli
from comfy_xdit.planning import cluster, planner, prediction, timed
from comfy_xdit.planning.auto import description, machine
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.reference import REFERENCES
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import ModelSpec

CPU, GPUS = cluster.of_cpu(2, 1 << 34), cluster.parse("4 x L40 PCIe")
ULYSSES, RING = ParallelConfig(ulysses_degree=2), ParallelConfig(ring_degree=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    return tmp_path


def test_the_ranks_describe_the_model_as_the_planner_has_it(folder):
    reference = REFERENCES["cpu"]
    bench.write_model(reference, folder / "bench.safetensors")
    told = ModelShape.of(description(ModelSpec.of(folder / "bench.safetensors", "transformer")))
    assert told.key == reference.shape.key
    assert replace(told, parameters=0) == replace(reference.shape, parameters=0)
    assert told.parameters == pytest.approx(reference.shape.parameters, rel=0.1)


def test_what_it_times():
    assert [named for named, _ in _named(CPU, "cpu")] == [
        "one rank",
        "ulysses 2",
        "ring 2",
        "one rank",
        "cfg 2",
    ]
    assert [named for named, _ in _named(GPUS, "cuda")] == [
        "one rank", "ulysses 2", "ring 2", "ulysses 4", "ring 4", "one rank", "cfg 2",
    ]  # fmt: skip
    assert [named for named, _ in _named(cluster.parse("1 x L40"), "cuda")] == ["one rank"]


def _named(where, kind):
    return [(planner.named(layout), guided) for layout, guided in timed.layouts(where, REFERENCES[kind])]


def test_its_times_correct_a_model_that_never_ran():
    """A machine that is slow at exchanging tokens in Ulysses' way: the pick of another model changes."""
    plain = REFERENCES["cuda"].request(guided=False)
    flux = Request.picture(PUBLISHED["flux"])
    before = planner.plan(flux, GPUS)
    assert before.pick.layout.ulysses_degree == 4
    known = Measured()
    for layout, slower in (
        (ParallelConfig(), 1.0), (ULYSSES, 4.0), (ParallelConfig(ulysses_degree=4), 4.0), (RING, 1.0),
        (ParallelConfig(ring_degree=4), 1.0),
    ):  # fmt: skip
        seconds = slower * prediction.predict(layout, plain, GPUS).seconds
        known = known.with_time(layout, plain, GPUS, seconds)

    after = planner.plan(flux, GPUS, known)

    assert after.pick.layout.ring_degree == 4
    assert after.pick.measured is None, "it was not this model that was timed"
    own = known.with_time(ParallelConfig(ulysses_degree=4), flux, GPUS, before.pick.expected)
    assert planner.plan(flux, GPUS, own).pick.layout.ulysses_degree == 4, "a model's own times go first"


def test_a_table_and_ratios_to_one_rank_of_the_same_request():
    one, guided = ParallelConfig(), ParallelConfig(cfg_parallel_degree=2)
    found = [
        timed.Timed(one, False, 0.3), timed.Timed(ULYSSES, False, 0.2),
        timed.Timed(one, True, 0.6), timed.Timed(guided, True, 0.4),
    ]  # fmt: skip
    assert timed.speedups(found) == pytest.approx({"ulysses 2": 1.5, "cfg 2 (cfg > 1)": 1.5})
    head, *rows = timed.table(found, REFERENCES["cpu"], CPU)
    assert head.split() == ["layout", "measured", "predicted", "speed-up"]
    assert [row.split()[-1] for row in rows] == ["1.00", "1.50", "1.00", "1.50"]


def test_the_command_measures_remembers_and_draws(folder, capsys):
    assert cli.main(["bench", "--output", str(folder / "out")]) == cli.DONE
    printed = capsys.readouterr().out
    where = machine(available_devices())
    assert "one rank: " in printed and "times now correct the plans" in printed
    plain = REFERENCES[where.device.kind].request(guided=False)
    assert Measured.load().seconds(ParallelConfig(), plain, where) > 0
    if where.size > 1:
        with Image.open(folder / "out" / bench.PLOT) as plot:
            assert plot.width > 400
