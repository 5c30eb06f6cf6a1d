"""An xDiT CLIP and VAE of the demo pipeline in the stock nodes."""

from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import DEMO, layout, relative_l2

PROMPT = "a large red circle on the left on a blue background"


@pytest.fixture
def pipeline(run_node) -> SimpleNamespace:
    if not (DEMO / "pipeline").is_dir():
        pytest.skip("no demo model")
    model, clip, vae = run_node(
        "XDiTLoadPipeline", pipeline="demo (comfy_xdit)", weight_dtype="default", parallel=layout(2)
    )
    return SimpleNamespace(model=model, clip=clip, vae=vae)


def _encode(run_node, clip, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    (((context, options),),) = run_node("CLIPTextEncode", clip=clip, text=text)
    return context, options["pooled_output"]


def test_text_encode(run_node, pipeline):
    context, pooled = _encode(run_node, pipeline.clip, PROMPT)
    other, _ = _encode(run_node, pipeline.clip, PROMPT.replace("red", "green"))

    assert context.ndim == 3
    assert context.shape[0] == pooled.shape[0] == 1
    assert torch.isfinite(context).all()
    assert not torch.equal(context, other)


def test_prompt_weights_reach_the_encoders(run_node, pipeline):
    plain, _ = _encode(run_node, pipeline.clip, "a red circle")
    same, _ = _encode(run_node, pipeline.clip, "a (red:1.0) circle")
    heavier, _ = _encode(run_node, pipeline.clip, "a (red:1.5) circle")

    assert relative_l2(same, plain) < 1e-5
    assert relative_l2(heavier, plain) > 1e-3


def test_clone_keeps_the_encoders(run_node, pipeline):
    from comfy_xdit.comfy_types.model.handles import remote_of

    clone = pipeline.clip.clone()

    assert remote_of(clone) is remote_of(pipeline.clip)
    assert torch.equal(_encode(run_node, clone, PROMPT)[0], _encode(run_node, pipeline.clip, PROMPT)[0])


@pytest.mark.parametrize("padding", ["none", "empty_prompt"])
@pytest.mark.parametrize("text", [PROMPT, ""], ids=["prompt", "empty"])
def test_sd3_text_node(comfyui, pipeline, padding, text):
    from comfy_extras.nodes_sd3 import CLIPTextEncodeSD3

    output = CLIPTextEncodeSD3.execute(pipeline.clip, text, text, text, padding)
    ((context, options),) = output[0]

    assert context.ndim == 3
    assert "pooled_output" in options


def test_flux_text_node(comfyui, pipeline):
    from comfy_extras.nodes_flux import CLIPTextEncodeFlux

    ((_, options),) = CLIPTextEncodeFlux.execute(pipeline.clip, PROMPT, PROMPT, 2.5)[0]

    assert options["guidance"] == 2.5


def test_last_layer_node_is_refused(run_node, pipeline):
    (clip,) = run_node("CLIPSetLastLayer", clip=pipeline.clip, stop_at_clip_layer=-2)

    with pytest.raises(InvalidInput, match="CLIPSetLastLayer"):
        _encode(run_node, clip, PROMPT)
    _encode(run_node, pipeline.clip, PROMPT)


def test_lora_of_the_text_encoders_is_refused(run_node, pipeline):
    import comfy.sd

    key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    lora = {f"{key}.lora_up.weight": torch.ones(64, 2), f"{key}.lora_down.weight": torch.ones(2, 64)}

    _, clip = comfy.sd.load_lora_for_models(None, pipeline.clip, lora, 0.0, 1.0)
    with pytest.raises(InvalidInput, match=r"weight patches \(clip_l\.transformer\.text_model"):
        _encode(run_node, clip, PROMPT)
    _, clip = comfy.sd.load_lora_for_models(None, pipeline.clip, lora, 0.0, 0.0)
    _encode(run_node, clip, PROMPT)


def test_embeddings_are_refused(run_node, pipeline):
    with pytest.raises(InvalidInput, match="embedding:easynegative"):
        _encode(run_node, pipeline.clip, "a circle, embedding:easynegative")


def test_vae_decode_and_encode(run_node, pipeline):
    pixels = torch.rand(2, 61, 76, 3, generator=torch.Generator().manual_seed(1))

    (latent,) = run_node("VAEEncode", pixels=pixels, vae=pipeline.vae)
    assert latent["samples"].shape == (2, 16, 7, 9)
    (image,) = run_node("VAEDecode", samples=latent, vae=pipeline.vae)
    assert image.shape == (2, 56, 72, 3)
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    (ours,) = run_node("XDiTVAEDecode", samples=latent, vae=pipeline.vae, tiling="none")
    assert torch.equal(ours, image)


def test_latent_of_another_family_is_refused(run_node, pipeline):
    with pytest.raises(InvalidInput, match=r"\(1, 4, 8, 8\) does not fit"):
        run_node("VAEDecode", samples={"samples": torch.zeros(1, 4, 8, 8)}, vae=pipeline.vae)


def test_vae_cannot_be_saved(pipeline):
    with pytest.raises(InvalidInput, match="cannot be saved"):
        pipeline.vae.get_sd()


def test_demo_draws_the_same_with_every_loader_and_sampler(run_node, pipeline, demo_sd3):
    (stock_model,) = run_node("UNETLoader", unet_name=demo_sd3, weight_dtype="default")
    settings = {
        "seed": 5,
        "steps": 8,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": run_node("CLIPTextEncode", clip=pipeline.clip, text=PROMPT)[0],
        "negative": run_node("CLIPTextEncode", clip=pipeline.clip, text="")[0],
        "latent_image": {"samples": torch.zeros(1, 16, 16, 16)},
    }
    (stock,) = run_node("KSampler", model=stock_model, **settings)

    for sampler in ("KSampler", "XDiTSampler"):
        (ours,) = run_node(sampler, model=pipeline.model, **settings)
        assert relative_l2(ours["samples"], stock["samples"]) <= 1e-4, sampler
