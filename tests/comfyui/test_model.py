"""An xDiT MODEL in stock nodes: the same numbers as the stock MODEL of the same file, or a refusal."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.errors import InvalidInput
from tests.comfyui.inputs import empty_latent, layout, random_conditioning, random_latent, relative_l2

PER_CALL = 1e-5
PER_RUN = 1e-4
STEPS = 4


# Of module scope, so that the tests of one layout run together: another layout is other processes.
@pytest.fixture(params=[1, 2], ids=["1rank", "2ranks"], scope="module")
def ranks(request) -> int:
    return request.param


@pytest.fixture
def models(run_node, tiny_sd3, ranks) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks, with conditioning that fits."""
    return _pair(run_node, tiny_sd3, ranks)


def _pair(run_node, name: str, ranks: int) -> SimpleNamespace:
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout(ranks)
    )
    return SimpleNamespace(
        stock=stock, ours=ours, positive=random_conditioning(ours, 1), negative=random_conditioning(ours, 2)
    )


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
    def call(patcher) -> torch.Tensor:
        conditions = models.positive[0]
        patcher.patch_model(load_weights=False)
        context, pooled = conditions[0], conditions[1]["pooled_output"]
        with torch.inference_mode():
            return patcher.model.apply_model(
                random_latent(batch, *size),
                torch.full((batch,), 0.7),
                c_crossattn=context.expand(batch, -1, -1),
                y=pooled.expand(batch, -1),
            )

    assert relative_l2(call(models.ours), call(models.stock)) <= PER_CALL


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_samplers(run_node, models, sampler, cfg):
    assert _difference(run_node, models, sampler_name=sampler, cfg=cfg) <= PER_RUN


@pytest.mark.parametrize("sampler", ["uni_pc", "dpmpp_sde", "res_multistep", "ddim"])
def test_further_samplers_of_comfyui(run_node, models, sampler):
    assert _difference(run_node, models, sampler_name=sampler) <= PER_RUN


@pytest.mark.parametrize("scheduler", ["normal", "karras", "beta", "sgm_uniform"])
def test_schedulers(run_node, models, scheduler):
    assert _difference(run_node, models, scheduler=scheduler) <= PER_RUN


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
def test_lower_precision_in_the_ranks(run_node, models, tiny_sd3, ranks, weight_dtype):
    lower = SimpleNamespace(**vars(models))
    (lower.ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype=weight_dtype, parallel=layout(ranks)
    )

    assert _difference(run_node, lower) <= 0.05


def test_shift_node_changes_both_alike(run_node, models):
    shifted = SimpleNamespace(**vars(models))
    (shifted.stock,) = run_node("ModelSamplingSD3", model=models.stock, shift=5.0)
    (shifted.ours,) = run_node("ModelSamplingSD3", model=models.ours, shift=5.0)

    assert _difference(run_node, shifted) <= PER_RUN
    assert _difference(run_node, models) <= PER_RUN  # and back


@pytest.mark.parametrize("degrees", [{"cfg_parallel_degree": 2}], ids=["cfg2"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_parallel(run_node, tiny_sd3, degrees, cfg):
    models = _pair(run_node, tiny_sd3, 1)
    (models.ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(**degrees)
    )

    assert _difference(run_node, models, cfg=cfg) <= PER_RUN


def test_demo_model(run_node, demo_sd3, ranks):
    models = _pair(run_node, demo_sd3, ranks)

    assert _difference(run_node, models) <= PER_RUN


def test_unloading_costs_nothing_but_the_mark(run_node, models):
    import comfy.model_management

    _difference(run_node, models)
    assert models.ours.loaded_size() == 1
    comfy.model_management.unload_all_models()
    assert models.ours.loaded_size() == 0
    assert _difference(run_node, models) <= PER_RUN


def test_clone_is_a_remote_model_too(models):
    from comfy_xdit.comfy_types import remote_of

    clone = models.ours.clone()

    assert type(clone) is type(models.ours)
    assert remote_of(clone) is remote_of(models.ours)


# ---------------------------------------------------------------------- what cannot reach the ranks


@pytest.fixture
def model(run_node, tiny_sd3):
    """A MODEL on one rank that a test may patch."""
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return model.clone()


def _sample(run_node, model, **settings) -> None:
    settings = {
        "positive": random_conditioning(model, 1),
        "negative": random_conditioning(model, 2),
    } | settings
    run_node(
        "KSampler",
        model=model,
        seed=1,
        steps=1,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        latent_image=empty_latent(1, 8, 8),
        **settings,
    )


def test_patch_inside_the_transformer_is_refused(run_node, model):
    model.set_model_attn2_patch(lambda *args: args)

    with pytest.raises(InvalidInput, match=r"transformer_options 'patches'.*attn2_patch"):
        _sample(run_node, model)


def test_unknown_transformer_option_is_refused(run_node, model):
    model.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}

    with pytest.raises(InvalidInput, match="rope_options"):
        _sample(run_node, model)


def test_replaced_module_inside_the_transformer_is_refused(run_node, model):
    model.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())

    with pytest.raises(InvalidInput, match=r"diffusion_model\.final_layer"):
        _sample(run_node, model)


def test_control_of_another_kind_is_refused(run_node, model):
    from comfy_xdit.comfy_types.model import _arguments  # the call a ControlNet ends in

    signature = inspect.signature(lambda x, timesteps, context=None, control=None: None)
    with pytest.raises(InvalidInput, match="'middle'"):
        _arguments(signature, (random_latent(), torch.ones(1)), {"control": {"middle": [random_latent()]}})


def test_saving_and_merging_are_refused(run_node, model):
    with pytest.raises(InvalidInput, match="cannot be saved"):
        model.model.state_dict_for_saving()
    with pytest.raises(InvalidInput, match="merging"):
        run_node("ModelMergeSimple", model1=model, model2=model, ratio=0.5)
