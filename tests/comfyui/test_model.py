"""An xDiT MODEL in stock nodes: the same numbers as the stock MODEL of the same file."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.comfyui.inputs import (
    FAMILIES,
    empty_latent,
    layout,
    pair,
    random_conditioning,
    random_latent,
    relative_l2,
)

PER_CALL = 1e-5
PER_RUN = 1e-4
STEPS = 4


@pytest.fixture(params=FAMILIES)
def models(request, run_node, degrees) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks, with conditioning that fits."""
    return _with_prompts(pair(run_node, request.getfixturevalue(f"tiny_{request.param}"), degrees))


def _with_prompts(models: SimpleNamespace) -> SimpleNamespace:
    models.positive, models.negative = (random_conditioning(models.ours, seed) for seed in (1, 2))
    return models


def _difference(run_node, models, latent=None, **settings) -> float:
    """Relative L2 of KSampler's result with our MODEL to that with the stock one."""
    settings = {
        "seed": 7,
        "steps": STEPS,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": models.positive,
        "negative": models.negative,
        "latent_image": latent or empty_latent(),
    } | settings
    (expected,) = run_node("KSampler", model=models.stock, **settings)
    (actual,) = run_node("KSampler", model=models.ours, **settings)
    assert actual["samples"].shape == expected["samples"].shape
    assert actual["samples"].dtype == expected["samples"].dtype
    return relative_l2(actual["samples"], expected["samples"])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(16, 16), (15, 17)], ids=["even", "odd"])
def test_one_call_equals_the_stock_transformer(run_node, models, batch, size):
    guidance = {"guidance": torch.full((batch,), 3.5)} if "Flux" in type(models.ours.model).__name__ else {}

    def call(patcher) -> torch.Tensor:
        ((context, options),) = models.positive
        patcher.patch_model(load_weights=False)
        with torch.inference_mode():
            return patcher.model.apply_model(
                random_latent(batch, *size),
                torch.full((batch,), 0.7),
                c_crossattn=context.expand(batch, -1, -1),
                y=options["pooled_output"].expand(batch, -1),
                transformer_options={},  # the default is one dict for all, in which stock Flux leaves notes
                **guidance,
            )

    assert relative_l2(call(models.ours), call(models.stock)) <= PER_CALL


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_and_odd_size(run_node, models, batch):
    assert _difference(run_node, models, empty_latent(batch, 15, 17)) <= PER_RUN


def test_picture_to_picture(run_node, models):
    assert _difference(run_node, models, {"samples": random_latent()}, denoise=0.6) <= PER_RUN


def test_inpainting_mask(run_node, models):
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 40:80] = 1.0

    assert _difference(run_node, models, {"samples": random_latent(), "noise_mask": mask}) <= PER_RUN


def test_prompts_of_different_length(run_node, models):
    longer = random_conditioning(models.ours, 5, tokens=31)

    assert _difference(run_node, models, positive=longer) <= PER_RUN


def test_combined_and_regional_prompts(run_node, models):
    other = random_conditioning(models.ours, 5)
    (left,) = run_node(
        "ConditioningSetArea", conditioning=other, width=64, height=128, x=0, y=0, strength=1.0
    )
    (both,) = run_node("ConditioningCombine", conditioning_1=models.positive, conditioning_2=left)

    assert _difference(run_node, models, positive=both) <= PER_RUN


def test_run_in_two_parts(run_node, models):
    def halves(model) -> torch.Tensor:
        shared = {
            "model": model,
            "noise_seed": 7,
            "steps": STEPS,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": models.positive,
            "negative": models.negative,
        }
        first = {"start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
        second = {"start_at_step": 2, "end_at_step": STEPS, "return_with_leftover_noise": "disable"}
        (half,) = run_node(
            "KSamplerAdvanced", add_noise="enable", latent_image=empty_latent(), **shared, **first
        )
        (whole,) = run_node("KSamplerAdvanced", add_noise="disable", latent_image=half, **shared, **second)
        return whole["samples"]

    assert relative_l2(halves(models.ours), halves(models.stock)) <= PER_RUN


def test_guider_without_negative_prompt(models):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    def run(model) -> torch.Tensor:
        guider = Guider_Basic(model)
        guider.set_conds(models.positive)
        sampler = comfy.samplers.sampler_object("dpmpp_2m")
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        with torch.inference_mode():
            return guider.sample(random_latent(), empty_latent()["samples"], sampler, sigmas, seed=1)

    assert relative_l2(run(models.ours), run(models.stock)) <= PER_RUN


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp16"])
def test_lower_precision_in_the_ranks(run_node, models, degrees, weight_dtype):
    from comfy_xdit.comfy_types.model.handles import remote_of

    lower = SimpleNamespace(**vars(models))
    (lower.ours,) = run_node(
        "XDiTLoadDiffusionModel",
        unet_name=Path(remote_of(models.ours).spec.path).name,
        weight_dtype=weight_dtype,
        parallel=layout(**degrees),
    )

    assert _difference(run_node, lower) <= 0.05


def test_demo_model(run_node, demo_sd3, degrees):
    models = _with_prompts(pair(run_node, demo_sd3, degrees))

    assert _difference(run_node, models) <= PER_RUN


def test_unloading_costs_nothing_but_the_mark(run_node, models):
    import comfy.model_management

    _difference(run_node, models)
    assert models.ours.loaded_size() == 1
    comfy.model_management.unload_all_models()
    assert models.ours.loaded_size() == 0
    assert _difference(run_node, models) <= PER_RUN


def test_clone_is_a_remote_model_too(models):
    from comfy_xdit.comfy_types.model.handles import remote_of

    clone = models.ours.clone()

    assert type(clone) is type(models.ours)
    assert remote_of(clone) is remote_of(models.ours)
