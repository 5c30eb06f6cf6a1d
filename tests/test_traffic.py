"""Bytes between ranks per step: no more than the xDiT paper's table says, and what we can count by hand."""

import pytest

from benchmarks import traffic
from tests import tiny
from worker.models.flux.family import Flux

AT_MOST = 1.05
PICTURE = (traffic.TOKENS - traffic.TEXT) * traffic.WIDTH * 4  # its tokens, gathered once per step
# Of N ranks each sends what the others need: 1 - 1/N of the table's bytes, which count the own part too.
BY_HAND = {
    "Ulysses 2": 4 * traffic.ACTIVATIONS * traffic.LAYERS / 2 / 2 + PICTURE / 2,
    "Ring 2": 2 * traffic.ACTIVATIONS * traffic.LAYERS / 2 + PICTURE / 2,
    "PipeFusion 2": traffic.ACTIVATIONS,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_sends_what_the_method_needs(tmp_path, monkeypatch, name):
    monkeypatch.setenv(traffic.COUNTS, str(tmp_path))
    parallel, formula = traffic.LAYOUTS[name]
    module = tiny.build(Flux(), traffic.CONFIG)
    file = tiny.write_native(Flux(), module, traffic.CONFIG, tmp_path / "flux.safetensors")

    counted = traffic.per_step(file, parallel)

    assert counted <= AT_MOST * formula
    # The rest are words: who stops, where a patch stands.
    assert counted == pytest.approx(BY_HAND[name], rel=0.01)
