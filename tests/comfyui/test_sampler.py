"""XDiTSampler against the stock KSampler on the stock MODEL: the same numbers, or a refusal."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import empty_latent, layout, random_conditioning, random_latent, relative_l2

PER_RUN = 1e-4


LAYOUTS = {
    "1rank": {"ulysses_degree": 1},
    "ulysses2": {"ulysses_degree": 2},
    "cfg2": {"cfg_parallel_degree": 2},
    # Exact as the others are; what it does after its warm-up is in tests/test_pipefusion.py.
    "pipefusion2": {"pipefusion_degree": 2, "warmup_steps": 100},
}


# Of module scope, so that the tests of one layout run together: another layout is other processes.
@pytest.fixture(params=LAYOUTS, scope="module")
def degrees(request) -> dict[str, int]:
    return LAYOUTS[request.param]


@pytest.fixture
def models(degrees, run_node, tiny_sd3) -> SimpleNamespace:
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel",
        unet_name=tiny_sd3,
        weight_dtype="default",
        parallel=layout(**degrees),
    )
    return SimpleNamespace(stock=stock, ours=ours)


def _settings(models: SimpleNamespace, **changed: Any) -> dict[str, Any]:
    return {
        "seed": 11,
        "steps": 4,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": random_conditioning(models.ours, 1),
        "negative": random_conditioning(models.ours, 2),
        "latent_image": empty_latent(),
    } | changed


def _difference(run_node, models: SimpleNamespace, **changed: Any) -> float:
    settings = _settings(models, **changed)
    (expected,) = run_node("KSampler", model=models.stock, **settings)
    (actual,) = run_node("XDiTSampler", model=models.ours, **settings)
    assert actual.keys() == expected.keys()
    return relative_l2(actual["samples"], expected["samples"])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_samplers(run_node, models, sampler, cfg):
    assert _difference(run_node, models, sampler_name=sampler, cfg=cfg) <= PER_RUN


@pytest.mark.parametrize("scheduler", ["normal", "karras", "beta", "sgm_uniform", "exponential"])
def test_schedulers(run_node, models, scheduler):
    assert _difference(run_node, models, scheduler=scheduler) <= PER_RUN


def test_batch_of_odd_size_with_indices(run_node, models):
    latent = {**empty_latent(2, 15, 17), "batch_index": [3, 1]}

    assert _difference(run_node, models, latent_image=latent) <= PER_RUN


def test_picture_to_picture(run_node, models):
    assert _difference(run_node, models, latent_image={"samples": random_latent()}, denoise=0.6) <= PER_RUN


def test_inpainting_mask(run_node, models):
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 40:80] = 1.0
    latent = {"samples": random_latent(), "noise_mask": mask}

    assert _difference(run_node, models, latent_image=latent) <= PER_RUN


def test_prompts_of_different_length(run_node, models):
    assert _difference(run_node, models, positive=random_conditioning(models.ours, 5, 31)) <= PER_RUN


def test_shift_node_counts(run_node, models):
    shifted = SimpleNamespace()
    (shifted.stock,) = run_node("ModelSamplingSD3", model=models.stock, shift=5.0)
    (shifted.ours,) = run_node("ModelSamplingSD3", model=models.ours, shift=5.0)

    assert _difference(run_node, shifted) <= PER_RUN


def test_denoise_zero_returns_the_latent(run_node, models):
    latent = {"samples": random_latent()}
    (answer,) = run_node(
        "XDiTSampler", model=models.ours, **_settings(models, latent_image=latent, denoise=0.0)
    )

    assert torch.equal(answer["samples"], latent["samples"])


def test_empty_latent_gets_the_models_channels(run_node, models):
    latent = {"samples": torch.zeros(1, 4, 16, 16)}

    assert _difference(run_node, models, latent_image=latent) <= PER_RUN


# ---------------------------------------------------------------------- what only KSampler can do


@pytest.fixture
def model(run_node, tiny_sd3) -> SimpleNamespace:
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return SimpleNamespace(ours=ours.clone())


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("area", (8, 8, 0, 0), "an area"),
        ("mask", torch.ones(1, 16, 16), "a mask"),
        ("strength", 0.5, "a strength"),
        ("start_percent", 0.2, "a range of steps"),
        ("control", object(), "a stock ControlNet"),
        ("hooks", object(), "hooks"),
    ],
)
def test_special_conditioning_is_refused(run_node, model, entry, value, words):
    positive = random_conditioning(model.ours, 1)
    positive[0][1][entry] = value

    with pytest.raises(InvalidInput, match=rf"positive has {words} \({entry}\).*stock KSampler"):
        run_node("XDiTSampler", model=model.ours, **_settings(model, positive=positive))


def test_several_conditionings_are_refused(run_node, model):
    negative = random_conditioning(model.ours, 1) + random_conditioning(model.ours, 2)

    with pytest.raises(InvalidInput, match=r"negative has 2 conditionings.*stock KSampler"):
        run_node("XDiTSampler", model=model.ours, **_settings(model, negative=negative))


def test_other_samplers_are_refused(run_node, model):
    with pytest.raises(InvalidInput, match=r"sampler 'ddim'.*euler, heun, dpmpp_2m.*stock KSampler"):
        run_node("XDiTSampler", model=model.ours, **_settings(model, sampler_name="ddim"))


def test_patched_guidance_is_refused(run_node, model):
    model.ours.set_model_sampler_post_cfg_function(lambda args: args["denoised"])

    with pytest.raises(InvalidInput, match=r"sampler_post_cfg_function.*stock KSampler"):
        run_node("XDiTSampler", model=model.ours, **_settings(model))


def test_video_latents_are_refused(run_node, model):
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}

    with pytest.raises(InvalidInput, match=r"\(1, 16, 3, 8, 8\); the ranks' loop takes pictures"):
        run_node("XDiTSampler", model=model.ours, **_settings(model, latent_image=latent))


def test_wrappers_are_refused(run_node, model):
    model.ours.add_wrapper("outer_sample", lambda executor, *args, **kwargs: executor(*args, **kwargs))

    with pytest.raises(InvalidInput, match=r"outer_sample.*stock KSampler"):
        run_node("XDiTSampler", model=model.ours, **_settings(model))
