"""N ranks against plain diffusers: one call, a 20-step run, and what does not divide."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layouts import LAYOUTS
from benchmarks.parity import MODELS, PER_CALL, PER_RUN, SIZES, cell, multiplier, twenty_steps, worst
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_calls_and_runs_equal_diffusers(tiny_models, layout, name, capsys):
    model, parallel = tiny_models[name], LAYOUTS[layout]
    calls = [worst(model, parallel, size) for size in SIZES]
    run = twenty_steps(model, parallel)
    with capsys.disabled():
        print(f"\n{name:14} {layout:18} {' '.join(map(cell, calls))}  20 steps {run:.1e}", end="")
    for size, error in zip(SIZES, calls, strict=True):
        assert error is None or error <= PER_CALL, f"{name}, {layout}, {size}: {error:.1e}"
    assert run <= PER_RUN, f"{name}, {layout}: {run:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_an_error_would_be_seen(tiny_models, name):
    """The limit separates right from wrong: one attended padding token is far above it."""
    model = tiny_models[name]
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((1,), 0.7 * multiplier(model))
    given = tiny.conditions(model.family, model.config, 8)
    expected = tiny.reference(model.family, model.module, x, timestep, given)
    padded = {**given, "context": torch.nn.functional.pad(given["context"], (0, 0, 0, 1))}
    wrong = tiny.reference(model.family, model.module, x, timestep, padded)
    assert tiny.relative_l2(wrong, expected) > 10 * PER_CALL


def test_heads_that_do_not_divide(tiny_models):
    model = tiny_models["sd3"]  # 4 heads
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), ParallelConfig(ulysses_degree=3))
    x = torch.randn(1, 16, 14, 18, generator=torch.Generator().manual_seed(5))
    timestep = torch.full((1,), 0.7 * multiplier(model))
    given = tiny.conditions(model.family, model.config, 8)
    expected = tiny.reference(model.family, model.module, x, timestep, given)
    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) <= PER_CALL


def test_fewer_heads_than_ranks_are_refused(tiny_models):
    spec = ModelSpec.of(tiny_models["sd3"].file, "transformer")
    remote = RemoteModel(spec, ParallelConfig(ulysses_degree=5))
    with pytest.raises(InvalidInput, match=r"ulysses_degree 5 is more than the 4 attention heads.*set"):
        remote.load()
