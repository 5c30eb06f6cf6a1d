"""The CLIP of diffusers folders in stock text nodes: what ComfyUI's models ask of a CONDITIONING."""

from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from tests.comfyui.inputs import layout, relative_l2

PROMPT = "a small red circle on the left"
# pipeline class -> entries beside pooled_output
ENTRIES = {
    "HunyuanDiTPipeline": {"attention_mask", "conditioning_mt5xl", "attention_mask_mt5xl"},
    "HunyuanVideoPipeline": {"attention_mask"},
    "MochiPipeline": {"attention_mask"},
    "WanPipeline": set(),
}


@pytest.fixture(scope="module")
def folders(comfyui: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict:
    from tests import text_folders  # what it imports of transformers needs the shim

    root = tmp_path_factory.mktemp("pipelines")
    with torch.inference_mode(False):
        return {name: text_folders.write(name, root) for name in ENTRIES}


def clip_of_folder(folders: dict, name: str) -> SimpleNamespace:
    from comfy_xdit.comfy_types.clip import clip_of
    from comfy_xdit.remote.text import RemoteTextEncoders

    remote = RemoteTextEncoders(ModelSpec.of(folders[name][1], "text_encoders"), layout(2))
    remote.load()
    return SimpleNamespace(clip=clip_of(remote), remote=remote)


@pytest.mark.parametrize("name", ENTRIES)
def test_clip_text_encode(comfyui, run_node, folders, name):
    made = clip_of_folder(folders, name)
    (((context, options),),) = run_node("CLIPTextEncode", clip=made.clip, text=PROMPT)
    prompts = {encoder: [[(PROMPT, 1.0)]] for encoder in made.remote.info["encoders"]}
    expected, pooled, more = made.remote.encode(prompts)

    assert relative_l2(context, expected) == 0
    assert options.keys() == {"pooled_output"} | ENTRIES[name]
    assert all(torch.equal(options[entry], more[entry]) for entry in ENTRIES[name])
    assert (options["pooled_output"] is None) == (pooled is None)
    heavy = run_node("CLIPTextEncode", clip=made.clip, text=PROMPT.replace("red", "(red:1.4)"))[0][0][0]
    assert 1e-5 < relative_l2(heavy, context) < 1


def test_a_prompt_for_each_encoder(comfyui, folders):
    from comfy_extras.nodes_hunyuan import CLIPTextEncodeHunyuanDiT

    clip = clip_of_folder(folders, "HunyuanDiTPipeline").clip
    is_new = hasattr(CLIPTextEncodeHunyuanDiT, "execute")  # of ComfyUI's second kind of node
    encode = CLIPTextEncodeHunyuanDiT.execute if is_new else CLIPTextEncodeHunyuanDiT().encode
    (both,), (other,) = encode(clip, PROMPT, PROMPT)[0], encode(clip, PROMPT, "a circle")[0]
    assert torch.equal(both[0], other[0])
    assert not torch.equal(both[1]["conditioning_mt5xl"], other[1]["conditioning_mt5xl"])


def test_what_a_prompt_cannot_have_is_refused(comfyui, folders):
    clip = clip_of_folder(folders, "HunyuanVideoPipeline").clip
    with pytest.raises(
        InvalidInput, match="a prompt with llama_template, image_embeds is not in this version"
    ):
        clip.tokenize(PROMPT, llama_template="{}", image_embeds=torch.zeros(1))


def test_a_lora_of_the_encoders_is_refused(comfyui, run_node, folders):
    import comfy.sd

    clip = clip_of_folder(folders, "HunyuanVideoPipeline").clip
    key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    lora = {f"{key}.lora_up.weight": torch.ones(32, 2), f"{key}.lora_down.weight": torch.ones(2, 32)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    with pytest.raises(InvalidInput, match=r"weight patches \(clip_l\.transformer\.text_model"):
        run_node("CLIPTextEncode", clip=patched, text=PROMPT)
