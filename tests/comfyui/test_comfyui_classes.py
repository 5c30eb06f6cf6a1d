"""ComfyUI's own classes in the ranks: every one of this ComfyUI, against itself in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_xdit.ranks.environment import rank_threads
from tests.comfyui.inputs import layout, relative_l2
from tests.comfyui.tiny_classes import write
from worker.models.comfyui.cases import CASES, Draw

LAYOUTS = {
    "CFG 2": {"cfg_parallel_degree": 2},
    "sharded 2": {"data_parallel_degree": 2, "shard_weights": True},
    "Ulysses 2": {"ulysses_degree": 2},
    "Ring 2": {"ring_degree": 2},
}
SPREAD = 1e-5  # relative L2 of a call


@pytest.fixture(scope="module", autouse=True)
def forced(comfyui):
    """SD3 and FLUX.1 too."""
    from comfy_xdit.comfy_types.choice import FORCED

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FORCED, "comfyui")
        yield


@pytest.fixture(scope="module", autouse=True)
def threads():
    """As many as a rank has: sums are in another order with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(rank_threads(1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(comfyui) -> Any:
    """Name of a case -> its file, written once."""
    written: dict[str, str] = {}

    def file(name: str) -> str:
        if name not in written:
            written[name] = write(name, comfyui.models / "diffusion_models")
        return written[name]

    return file


@pytest.fixture(scope="module", params=LAYOUTS)
def degrees(request) -> dict[str, Any]:
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


def models(comfyui, run_node, file: str, degrees: dict[str, Any], dtype: str = "default") -> SimpleNamespace:
    import comfy.sd

    path = str(comfyui.models / "diffusion_models" / file)
    options = {"dtype": torch.bfloat16} if dtype == "bf16" else {}
    stock = comfy.sd.load_diffusion_model(path, model_options=options)
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=file, weight_dtype=dtype, parallel=layout(**degrees)
    )
    return SimpleNamespace(stock=stock, ours=ours)


def call(model: Any, name: str, batch: int) -> list[torch.Tensor]:
    """One call of the transformer, as BaseModel makes it."""
    args, kwargs = CASES[name].call(Draw(batch))
    with torch.inference_mode():
        out = model.model.diffusion_model(*args, **kwargs, transformer_options=options())
    return [out] if isinstance(out, torch.Tensor) else list(out)


def options() -> dict[str, Any]:
    """What samplers and nodes put there, and classes read."""
    scale = {"scale_x": 1.1, "scale_y": 0.9, "scale_t": 1.2}
    return {
        "rope_options": scale | {"shift_x": 1.0, "shift_y": 2.0, "shift_t": 0.5},
        "sigmas": torch.tensor([0.5]),
        "sample_sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "cond_or_uncond": [0],
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["default", "bf16"])
def test_one_rank_is_bit_equal_to_stock(comfyui, run_node, files, dtype, name):
    pair = models(comfyui, run_node, files(name), {}, dtype)

    batch = CASES[name].batches[0]
    for actual, wanted in zip(call(pair.ours, name, batch), call(pair.stock, name, batch), strict=True):
        assert wanted.isfinite().all() and wanted.norm() > 0, "the tiny model says nothing"
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_equal_stock(comfyui, run_node, files, degrees, name):
    pair = models(comfyui, run_node, files(name), degrees)

    for batch in CASES[name].batches:
        for actual, wanted in zip(call(pair.ours, name, batch), call(pair.stock, name, batch), strict=True):
            assert relative_l2(actual, wanted) <= SPREAD
