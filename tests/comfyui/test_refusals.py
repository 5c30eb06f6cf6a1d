"""What a node adds that cannot reach the ranks is refused by name and remedy, never ignored."""

import inspect

import pytest
import torch

from comfy_xdit.errors import InvalidInput
from tests.comfyui.inputs import empty_latent, layout, random_conditioning, random_latent


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
    model.model_options["transformer_options"]["minimax_h3_sigma_shift"] = {"scale_x": 2.0}

    with pytest.raises(InvalidInput, match="minimax_h3_sigma_shift"):
        _sample(run_node, model)


def test_an_option_that_the_family_does_not_take_is_refused_by_the_ranks(run_node, model):
    model.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}

    with pytest.raises(InvalidInput, match="carries rope_options, which sd3 in the ranks does not take"):
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
