"""What a node adds that cannot reach the ranks is refused by name and remedy, never ignored."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import layout, one_step, random_latent
from tests.comfyui.tiny_classes import write


@pytest.fixture
def model(run_node, tiny_sd3):
    """A MODEL on one rank that a test may patch."""
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return model.clone()


def test_patch_inside_the_transformer_is_refused(run_node, model):
    model.set_model_attn2_patch(lambda *args: args)

    with pytest.raises(InvalidInput, match=r"transformer_options 'patches'.*attn2_patch"):
        one_step(run_node, model)


def test_unknown_transformer_option_is_refused(run_node, model):
    model.model_options["transformer_options"]["minimax_h3_sigma_shift"] = {"scale_x": 2.0}

    with pytest.raises(InvalidInput, match="minimax_h3_sigma_shift"):
        one_step(run_node, model)


def test_an_option_that_the_family_does_not_take_is_refused_by_the_ranks(run_node, model):
    model.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}

    with pytest.raises(InvalidInput, match="carries rope_options, which sd3 in the ranks does not take"):
        one_step(run_node, model)


def test_replaced_module_inside_the_transformer_is_refused(run_node, model):
    model.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())

    with pytest.raises(InvalidInput, match=r"diffusion_model\.final_layer"):
        one_step(run_node, model)


def test_control_of_another_kind_is_refused(run_node, model):
    from comfy_xdit.comfy_types.model.handles import _arguments  # the call a ControlNet ends in

    signature = inspect.signature(lambda x, timesteps, context=None, control=None: None)
    with pytest.raises(InvalidInput, match="'middle'"):
        _arguments(signature, (random_latent(), torch.ones(1)), {"control": {"middle": [random_latent()]}})


def test_saving_and_merging_are_refused(run_node, model):
    with pytest.raises(InvalidInput, match="cannot be saved"):
        model.model.state_dict_for_saving()
    with pytest.raises(InvalidInput, match="merging"):
        run_node("ModelMergeSimple", model1=model, model2=model, ratio=0.5)


# Stock nodes whose patches act inside the transformer, and what their refusal names.
INSIDE = {
    "SkipLayerGuidanceSD3": (
        {"layers": "1", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0},
        "patches_replace.*dit.*Remove that node",
    ),
    "SkipLayerGuidanceDiT": (
        {
            "double_layers": "1", "single_layers": "1", "scale": 3.0, "rescaling_scale": 0.0,
            "start_percent": 0.0, "end_percent": 1.0,
        },
        "patches_replace.*dit.*Remove that node",
    ),
    "PerturbedAttentionGuidance": ({"scale": 3.0}, "patches_replace.*attn1.*Remove that node"),
    "SelfAttentionGuidance": ({"scale": 0.5, "blur_sigma": 2.0}, "patches_replace.*attn1.*Remove that node"),
    "TomePatchModel": ({"ratio": 0.3}, "attn1_patch.*Remove that node"),
    "TorchCompileModel": ({"backend": "inductor"}, "torch.compile cannot.*Remove the TorchCompileModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_a_node_that_acts_inside_the_transformer_is_refused(run_node, model, name):
    inputs, words = INSIDE[name]
    (changed, *_) = run_node(name, model=model, **inputs)

    with pytest.raises(InvalidInput, match=words):
        one_step(run_node, changed)
    one_step(run_node, model)  # nothing is lost


def test_forward_injections_are_refused(run_node, model):
    """As bypass LoRA loaders of newer versions make them."""
    model.set_injections("bypass_lora", [])
    model.injections["bypass_lora"] = [object()]

    with pytest.raises(InvalidInput, match=r"forward injections \(bypass_lora\).*Use a normal LoRA node"):
        model.refuse_what_stays_here()


def test_weight_wrappers_are_refused(model):
    model.add_weight_wrapper("diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", lambda weight: weight)

    with pytest.raises(InvalidInput, match="weight wrappers cannot reach"):
        model.refuse_what_stays_here()


def test_copies_per_gpu_are_refused(model):
    """What the MultiGPU nodes of newer versions ask for."""
    with pytest.raises(InvalidInput, match=r"a copy of the model per GPU.*the ranks use all GPUs"):
        model.deepclone_multigpu()


def test_model_save_is_refused(run_node, model):
    with pytest.raises(InvalidInput, match=r"cannot be saved|saving cannot reach"):
        run_node("ModelSave", model=model, filename_prefix="refused")


def test_several_latents_at_once_are_refused():
    from comfy_xdit.comfy_types.model.handles import _arguments  # the call of a family of picture and sound

    signature = inspect.signature(lambda x, timesteps, context=None: None)
    with pytest.raises(InvalidInput, match="2 latents at once"):
        _arguments(signature, ([random_latent()] * 2, torch.ones(1)), {})


def test_a_control_that_saw_padded_prompts_is_refused():
    from comfy_xdit.comfy_types.model.handles import _arguments
    from comfy_xdit.protocol.messages import LENGTHS

    signature = inspect.signature(lambda x, timesteps, context=None, control=None, **kwargs: None)
    given = {"control": {"output": [random_latent()]}, LENGTHS: torch.tensor([3, 4])}
    with pytest.raises(InvalidInput, match=r"different length in one batch.*'Apply ControlNet' \(advanced\)"):
        _arguments(signature, (random_latent(), torch.ones(1)), given)


def test_what_is_no_model_is_refused():
    from comfy_xdit.comfy_types.model.handles import remote_of

    with pytest.raises(InvalidInput, match="str is neither a MODEL, a CLIP nor a VAE"):
        remote_of("model")


def test_tokenizer_options_and_unprojected_vectors_are_refused(comfyui):
    from comfy_xdit.comfy_types.clip import PromptReader, TextEncoders
    from comfy_xdit.protocol.spec import ModelSpec
    from comfy_xdit.remote.text import RemoteTextEncoders

    with pytest.raises(InvalidInput, match=r"tokenizer options \(t5xxl_min_length\).*remove the node"):
        PromptReader(()).tokenize_with_weights("a", tokenizer_options={"t5xxl_min_length": 3})
    with pytest.raises(
        InvalidInput, match=r"a prompt with llama_template is not in this version.*stock CLIP"
    ):
        PromptReader(()).tokenize_with_weights("a", llama_template="{}", images=None)
    with pytest.raises(InvalidInput, match=r"cannot be saved or merged.*stock loader"):
        PromptReader(()).state_dict()
    encoders = TextEncoders(RemoteTextEncoders(ModelSpec("", "text_encoders"), layout(1), {"encoders": ()}))
    with pytest.raises(InvalidInput, match="unprojected pooled output is not in this version"):
        encoders.set_clip_options({"projected_pooled": False})
    with pytest.raises(InvalidInput, match=r"cannot be saved or merged.*stock loader"):
        encoders.load_sd({})


def test_files_that_are_no_models_are_refused(comfyui, tmp_path):
    from comfy_xdit.comfy_types.model.detection import read_header, transformer_files
    from comfy_xdit.comfy_types.model.residuals import _stored

    with pytest.raises(InvalidInput, match=r"no \.safetensors file in .*choose a diffusers folder"):
        transformer_files(tmp_path)
    (tmp_path / "text.safetensors").write_text("no header")
    with pytest.raises(InvalidInput, match="is damaged or not a safetensors file"):
        read_header(tmp_path / "text.safetensors")
    save_file({"some.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidInput, match=r"no tensor x_embedder\.proj\.weight.*use a complete file"):
        _stored([tmp_path / "other.safetensors"], "x_embedder.proj.weight")


def test_a_sampler_that_keeps_keys_from_call_to_call_is_refused(comfyui, run_node):
    import comfy.k_diffusion.sampling

    if not hasattr(comfy.k_diffusion.sampling, "sample_ar_video"):
        pytest.skip("this ComfyUI draws no video part by part")
    folder = comfyui.models / "diffusion_models"
    tensors = load_file(folder / write("wan causal", folder))
    config = json.dumps({"transformer": {"causal_ar": True}})
    save_file(tensors, folder / "causal.safetensors", {"config": config})
    (model,) = run_node(
        "XDiTLoadDiffusionModel",
        unet_name="causal.safetensors",
        weight_dtype="default",
        parallel=layout(1),
    )
    assert type(model.model.diffusion_model).__name__ == "CausalWanModel"

    with pytest.raises(InvalidInput, match="keeps keys of CausalWanModel from call to call"):
        model.model.diffusion_model.init_kv_caches(1, 105, torch.device("cpu"), torch.float32)
