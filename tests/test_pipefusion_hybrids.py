"""PipeFusion with its patches spread over sequence ranks, and with replicas."""

from __future__ import annotations

import pytest

from comfy_xdit.protocol.parallel import ParallelConfig
from tests.pipefusion_runs import ALL, EXACT, MODELS, drift, plain, request, simulated, uneven, write_models

LAYOUTS = {
    "Ulysses": ParallelConfig(pipefusion_degree=2, ulysses_degree=2),
    "Ring": ParallelConfig(pipefusion_degree=2, ring_degree=2),
    "data": ParallelConfig(pipefusion_degree=2, data_parallel_degree=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change",
    [{}, {"size": (30, 26), "batch": 3, "text": (9, 9)}, {"size": (6, 6), "cfg": 1.0, "text": (1, 1)}],
    ids=["odd picture", "15 x 13 tokens, three pictures", "9 tokens, 1 of text"],
)
def test_full_warm_up_equals_diffusers(models, layout, name, change):
    asked = request(models[name], **change)
    assert drift(models[name], layout, asked, plain(models[name], asked), ALL) <= EXACT


@pytest.mark.parametrize("name", MODELS)
def test_drift_is_the_algorithms(models, layout, name):
    """What stages and sequence ranks compute does not depend on how many share a patch."""
    asked = uneven(models[name], 3.0)
    expected = simulated(models[name], asked, layout.pipefusion_degree)
    assert drift(models[name], layout, asked, expected, 1) <= EXACT
