"""XDiTSampler against the stock KSampler on the stock MODEL: the same numbers, in the ranks' loop or not."""

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


# The nodes that change how a MODEL samples; each runs in the ranks.
PREDICTIONS = {
    "epsilon": ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}),
    "v": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
    "v, zero SNR": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
    "continuous v": (
        "ModelSamplingContinuousV",
        {"sampling": "v_prediction", "sigma_max": 80, "sigma_min": 0.03},
    ),
    "EDM, epsilon": ("ModelSamplingContinuousEDM", {"sampling": "eps", "sigma_max": 20, "sigma_min": 0.002}),
    "EDM, v": (
        "ModelSamplingContinuousEDM",
        {"sampling": "v_prediction", "sigma_max": 20, "sigma_min": 0.002},
    ),
}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions(run_node, models, prediction, sampler):
    changed = _predicting(run_node, models, prediction)
    assert _difference(run_node, changed, sampler_name=sampler, scheduler="karras") <= 1e-5
    assert _difference(run_node, changed, sampler_name=sampler, cfg=1.0) <= 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_predictions_with_a_picture_and_a_mask(run_node, models, prediction):
    changed = _predicting(run_node, models, prediction)
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 40:80] = 1.0
    latent = {"samples": random_latent()}
    assert _difference(run_node, changed, latent_image=latent, denoise=0.6) <= 1e-5
    assert _difference(run_node, changed, latent_image=latent | {"noise_mask": mask}) <= 1e-5


def _predicting(run_node, models: SimpleNamespace, prediction: str) -> SimpleNamespace:
    node, widgets = PREDICTIONS[prediction]
    stock, ours = (run_node(node, model=model, **widgets)[0] for model in (models.stock, models.ours))
    return SimpleNamespace(stock=stock, ours=ours)


def test_denoise_zero_returns_the_latent(run_node, models):
    latent = {"samples": random_latent()}
    (answer,) = run_node(
        "XDiTSampler", model=models.ours, **_settings(models, latent_image=latent, denoise=0.0)
    )

    assert torch.equal(answer["samples"], latent["samples"])


def test_empty_latent_gets_the_models_channels(run_node, models):
    latent = {"samples": torch.zeros(1, 4, 16, 16)}

    assert _difference(run_node, models, latent_image=latent) <= PER_RUN


# ---------------------------------------------------------------------- what the ranks' loop cannot do


@pytest.fixture
def pair(run_node, tiny_sd3) -> SimpleNamespace:
    """The stock MODEL and ours on one rank, to be changed by a test."""
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return SimpleNamespace(stock=stock.clone(), ours=ours.clone())


def _driven(run_node, pair: SimpleNamespace, words: str, **changed: Any) -> float:
    """The difference to KSampler of a run that says `words` on the node."""
    settings = _settings(pair, **changed)
    (expected,) = run_node("KSampler", model=pair.stock, **settings)
    answer = run_node("XDiTSampler", model=pair.ours, **settings)
    (text,) = answer["ui"]["text"]
    assert text.startswith("Sampled as KSampler does it: ") and words in text
    return relative_l2(answer["result"][0]["samples"], expected["samples"])


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("area", (8, 8, 0, 0), "positive has an area (area)"),
        ("mask", torch.ones(1, 16, 16) * 0.5, "positive has a mask (mask)"),
        ("strength", 0.5, "positive has a strength (strength)"),
        ("start_percent", 0.2, "positive has a range of steps (start_percent)"),
    ],
)
def test_a_special_conditioning_is_driven_from_here(run_node, pair, entry, value, words):
    positive = random_conditioning(pair.ours, 1)
    positive[0][1][entry] = value
    assert _driven(run_node, pair, words, positive=positive) <= PER_RUN


def test_several_conditionings(run_node, pair):
    negative = random_conditioning(pair.ours, 1) + random_conditioning(pair.ours, 2)
    assert _driven(run_node, pair, "negative has 2 conditionings", negative=negative) <= PER_RUN


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_sde", "res_multistep", "uni_pc"])
def test_other_samplers(run_node, pair, sampler):
    words = f"sampler '{sampler}' does not run in the ranks (euler, heun, dpmpp_2m do)"
    assert _driven(run_node, pair, words, sampler_name=sampler) <= PER_RUN


def test_patched_guidance(run_node, pair):
    for model in (pair.stock, pair.ours):
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    assert _driven(run_node, pair, "sampler_post_cfg_function") <= PER_RUN


@pytest.mark.parametrize("sampling", ["edm", "cosmos_rflow"])
def test_a_model_that_predicts_something_else(run_node, pair, sampling):
    given = {"sampling": sampling, "sigma_max": 20.0, "sigma_min": 0.002}
    changed = SimpleNamespace()
    (changed.stock,) = run_node("ModelSamplingContinuousEDM", model=pair.stock, **given)
    (changed.ours,) = run_node("ModelSamplingContinuousEDM", model=pair.ours, **given)
    assert _driven(run_node, changed, "knows flow, epsilon, v prediction") <= PER_RUN


def test_a_class_of_comfyuis_own(run_node, tiny_sd3, monkeypatch):
    from comfy_xdit.comfy_types.choice import FORCED

    monkeypatch.setenv(FORCED, "comfyui")
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    words = "the ranks' loop is for diffusers' classes, and OpenAISignatureMMDITWrapper runs in ComfyUI's own"
    assert _driven(run_node, SimpleNamespace(stock=stock, ours=ours), words) <= PER_RUN


def test_what_comfyuis_class_does_around_a_call(run_node, pair, monkeypatch):
    """As video models do with a timestep per frame, where a mask keeps some of them."""
    own = type(pair.ours.model)

    def process_timestep(self, timestep, x, denoise_mask=None, **_):
        return timestep if denoise_mask is None else timestep * denoise_mask.mean()

    monkeypatch.setattr(own, "process_timestep", process_timestep)
    assert _difference(run_node, pair) <= PER_RUN
    mask = {"samples": random_latent(), "noise_mask": torch.ones(1, 128, 128) * 0.5}
    words = f"ComfyUI's {own.__name__} has its own process_timestep"
    _driven(run_node, pair, words, latent_image=mask)


def test_wrappers(run_node, pair):
    for model in (pair.stock, pair.ours):
        model.add_wrapper("outer_sample", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert _driven(run_node, pair, "outer_sample") <= PER_RUN


def test_under_pipefusion_there_is_no_other_loop(run_node, tiny_sd3):
    (ours,) = run_node(
        "XDiTLoadDiffusionModel",
        unet_name=tiny_sd3,
        weight_dtype="default",
        parallel=layout(pipefusion_degree=2),
    )
    settings = _settings(SimpleNamespace(ours=ours), sampler_name="ddim")
    with pytest.raises(InvalidInput, match=r"'ddim'.*with pipefusion_degree 2 there is no other loop"):
        run_node("XDiTSampler", model=ours, **settings)
