"""Ranks that share one device against plain diffusers on it, in every dtype and by every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.layouts import LAYOUTS, PIPELINES, SHARDED
from benchmarks.parity import MODELS, one_step
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import pipefusion_runs as runs
from tests.gpu.device import AS_EXACT, DEVICE, DTYPES, EXACT, HAS_GPU, exact, here, inputs, plain
from tests.tiny import TinyModel, relative_l2

SPREAD = {
    name: (LAYOUTS | SHARDED | PIPELINES)[name]
    for name in (
        "Ulysses 2", "Ring 2", "Ulysses 2 x Ring 2", "CFG 2 x Ulysses 2", "data 2 x CFG 2",
        "Ulysses 2, sharded", "CFG 2 x Ulysses 2, sharded", "PipeFusion 2", "PipeFusion 2 x Ulysses 2",
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=SPREAD)
def layout(request) -> ParallelConfig:
    """Grouped by pytest, so that each layout's ranks start once."""
    return here(SPREAD[request.param])


def called(model: TinyModel, layout: ParallelConfig, dtype: str) -> torch.Tensor:
    """What the ranks give for the same inputs."""
    remote = RemoteModel(ModelSpec.of(model.file, "transformer", dtype), layout)
    call = one_step if layout.pipefusion_degree > 1 else RemoteModel.denoise
    return call(remote, *inputs(model)).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_one_rank_gives_what_plain_diffusers_gives(tiny_models, name: str, dtype: str):
    """In halves too: the same kernels on the same numbers round alike."""
    model = tiny_models[name]
    got, wanted = called(model, here(ParallelConfig()), dtype), plain(model, DTYPES[dtype])
    assert relative_l2(got, wanted) <= EXACT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sd3.5-medium", "flux"])
def test_ranks_are_as_exact_as_plain_diffusers(tiny_models, layout, name: str, dtype: str):
    model = tiny_models[name]
    if HAS_GPU and dtype == "fp32" and layout.ring_degree > 1:
        with pytest.raises(InvalidInput, match="fp16 or bf16"):
            called(model, layout, dtype)
        return
    error = relative_l2(called(model, layout, dtype), exact(model))
    rounding = relative_l2(plain(model, DTYPES[dtype]), exact(model))
    assert error <= max(EXACT, AS_EXACT * rounding)
    assert dtype == "fp32" or rounding > 10 * EXACT, "or the limit would say nothing of the dtype"


def test_patches_of_several_steps_are_those_of_the_algorithm(tmp_path):
    """One warm-up step, then keys and values of the step before: against a simulation in one process."""
    model = runs.write_models(tmp_path)["flux"]
    asked, two = runs.uneven(model, cfg=1.0), here(ParallelConfig(pipefusion_degree=2))
    asked = replace(asked, spec=ModelSpec.of(model.file, "transformer", "fp32"))
    wanted = runs.simulated(model, asked, 2)
    assert runs.drift(model, two, asked, wanted, 1) <= (1e-4 if DEVICE.type == "cuda" else EXACT)
