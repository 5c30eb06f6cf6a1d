"""A MODEL that nobody holds is gone at once: no cycle keeps it until the garbage collector runs."""

import gc
import logging
import weakref
from collections.abc import Iterator

import pytest

from tests.comfyui.inputs import FAMILIES, empty_latent, layout, random_conditioning


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", [None, "KSampler", "XDiTSampler"])
def test_the_twin_dies_with_its_last_model(
    request, run_node, comfyui, without_collector, caplog, family, sampler
):
    """After a run, too, and a clone's; ComfyUI then has no leak to report."""
    import comfy.model_management

    name = request.getfixturevalue(f"tiny_{family}")
    inputs = {"unet_name": name, "weight_dtype": "default", "parallel": layout(1)}
    (model,) = run_node("XDiTLoadDiffusionModel", **inputs)
    clone = model.clone()
    if sampler is not None:
        run_node(
            sampler, model=clone, seed=1, steps=1, cfg=3.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, latent_image=empty_latent(1, 8, 8),
            positive=random_conditioning(model, 1), negative=random_conditioning(model, 2, tokens=9),
        )  # fmt: skip
    twin, transformer = weakref.ref(model.model), weakref.ref(model.model.diffusion_model)

    del model, clone

    assert twin() is None and transformer() is None
    with caplog.at_level(logging.WARNING):
        comfy.model_management.cleanup_models_gc()
    assert "memory leak" not in caplog.text
