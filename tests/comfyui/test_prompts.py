"""Prompts of different length: one call where that is right, two where it is not, and stock's numbers."""

from types import SimpleNamespace

import pytest
import torch

from tests.comfyui.inputs import (
    FAMILIES,
    empty_latent,
    pair,
    random_conditioning,
    random_latent,
    relative_l2,
)

PER_CALL = 1e-5
PER_RUN = 1e-4
STEPS = 3


@pytest.fixture(params=FAMILIES)
def models(request, run_node, degrees) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks; prompts of 12 and 31 tokens."""
    models = pair(run_node, request.getfixturevalue(f"tiny_{request.param}"), degrees)
    models.ours = models.ours.clone()
    models.positive = random_conditioning(models.ours, 1)
    models.negative = random_conditioning(models.ours, 2, tokens=31)
    return models


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The batch of each call that crosses the bridge."""
    from comfy_xdit.remote.model import RemoteModel

    seen: list[int] = []
    denoise = RemoteModel.denoise

    def counted(self, x, *args, **kwargs):
        seen.append(x.shape[0])
        return denoise(self, x, *args, **kwargs)

    monkeypatch.setattr(RemoteModel, "denoise", counted)
    return seen


def _difference(run_node, models, batch: int = 1, **settings) -> float:
    settings = {
        "seed": 7,
        "steps": STEPS,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": models.positive,
        "negative": models.negative,
        "latent_image": empty_latent(batch, 10, 13),
    } | settings
    (expected,) = run_node("KSampler", model=models.stock, **settings)
    (actual,) = run_node("KSampler", model=models.ours, **settings)
    return relative_l2(actual["samples"], expected["samples"])


@pytest.mark.parametrize("batch", [1, 2])
def test_one_call_per_step(run_node, models, calls, batch):
    assert _difference(run_node, models, batch) <= PER_RUN
    assert calls == [2 * batch] * STEPS


def test_one_step_is_exact(models, calls):
    """Both sides of guidance, as the sampler computes them."""
    from comfy.samplers import calc_cond_batch, process_conds

    def sides(patcher) -> torch.Tensor:
        patcher.patch_model(load_weights=False)
        patcher.pre_run()
        x, times = random_latent(2, 15, 17), torch.full((2,), 0.7)
        conds = {
            name: [
                {"cross_attn": context, "model_conds": {}, "uuid": name, **options}
                for context, options in getattr(models, name)
            ]
            for name in ("positive", "negative")
        }
        with torch.inference_mode():
            conds = process_conds(patcher.model, x, conds, torch.device("cpu"))
            out = calc_cond_batch(patcher.model, list(conds.values()), x, times, patcher.model_options)
        patcher.cleanup()
        return torch.stack(out)

    assert relative_l2(sides(models.ours), sides(models.stock)) <= PER_CALL
    assert calls == [4]


def test_three_lengths_and_a_region(run_node, models, calls):
    other = random_conditioning(models.ours, 5, tokens=20)
    (left,) = run_node(
        "ConditioningSetArea", conditioning=other, width=104, height=80, x=0, y=0, strength=1.0
    )
    (both,) = run_node("ConditioningCombine", conditioning_1=models.positive, conditioning_2=left)

    assert _difference(run_node, models, positive=both) <= PER_RUN
    assert calls == [4] * STEPS  # the region has a negative side of its own


def test_prompts_of_one_length_say_nothing_about_it(run_node, models, monkeypatch):
    from comfy_xdit.remote.model import RemoteModel

    denoise, given = RemoteModel.denoise, []
    monkeypatch.setattr(
        RemoteModel, "denoise", lambda self, **call: given.append(call) or denoise(self, **call)
    )

    assert _difference(run_node, models, negative=random_conditioning(models.ours, 2)) <= PER_RUN
    assert len(given) == STEPS
    assert all("context_lengths" not in call["conditions"] for call in given)


def test_a_wrapper_that_sees_the_prompts_gets_them_unpadded(run_node, models, calls):
    seen = []

    def wrapper(apply_model, arguments):
        seen.append(arguments["c"]["c_crossattn"].shape[1])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    models.ours.set_model_unet_function_wrapper(wrapper)

    assert _difference(run_node, models) <= PER_RUN
    assert sorted(seen) == sorted([12, 31] * STEPS)
    assert calls == [1] * 2 * STEPS


def test_a_wrapper_around_the_transformer_gets_them_unpadded(run_node, models, calls):
    from comfy.patcher_extension import WrappersMP

    models.ours.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )

    assert _difference(run_node, models) <= PER_RUN
    assert calls == [1] * 2 * STEPS


def test_the_loop_in_the_ranks_takes_them_too(run_node, models):
    settings = {
        "seed": 7, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": models.positive, "negative": models.negative, "latent_image": empty_latent(1, 10, 13),
    }  # fmt: skip
    (expected,) = run_node("KSampler", model=models.stock, **settings)
    (actual,) = run_node("XDiTSampler", model=models.ours, **settings)

    assert relative_l2(actual["samples"], expected["samples"]) <= PER_RUN
