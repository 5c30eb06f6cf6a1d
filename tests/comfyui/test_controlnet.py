"""Stock ControlNets before an xDiT MODEL: the same pictures as before the stock MODEL."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
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

_SHORT = {
    "seed": 7, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    "latent_image": empty_latent(1, 10, 14),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def models(request, run_node, degrees) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks, and a ControlNet that fits."""
    models = pair(run_node, request.getfixturevalue(f"tiny_{request.param}"), degrees)
    models.net = _mmdit_net(models.stock) if request.param == "sd3" else _flux_net(models.stock)
    return models


def _wrapped(module, **options):
    """A random ControlNet, whose hint is a latent so that no VAE is needed."""
    import comfy.controlnet

    tiny.randomise(module, 5)
    return comfy.controlnet.ControlNet(
        module, compression_ratio=1, load_device=torch.device("cpu"), **options
    )


def _mmdit_net(stock):
    import comfy.cldm.mmdit
    import comfy.ops

    config = {"num_blocks": 2, "dtype": torch.float32, **stock.model.model_config.unet_config}
    module = comfy.cldm.mmdit.ControlNet(operations=comfy.ops.disable_weight_init, **config)
    # A buffer that ComfyUI leaves as it found the memory, until a file fills it.
    torch.nn.init.normal_(module.pos_embed, std=0.5, generator=torch.Generator().manual_seed(6))
    return _wrapped(module)


def _flux_net(stock):
    import comfy.ldm.flux.controlnet
    import comfy.ops

    config = {**stock.model.model_config.unet_config, "depth": 2, "depth_single_blocks": 1}
    config = {"dtype": torch.float32, "operations": comfy.ops.disable_weight_init, **config}
    module = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, **config)
    return _wrapped(module, extra_conds=["y", "guidance"])


def _hint(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, height, width, 16, generator=torch.Generator().manual_seed(9))


def _difference(run_node, models, net, latent, longer: int = 12, **settings) -> float:
    """Relative L2 of KSampler's result with our MODEL to that with the stock one, with the ControlNet."""
    positive, negative = run_node(
        "ControlNetApplyAdvanced",
        positive=random_conditioning(models.ours, 1),
        negative=random_conditioning(models.ours, 2, longer),
        control_net=net,
        image=_hint(*latent["samples"].shape[-2:]),
        strength=0.8,
        start_percent=0.0,
        end_percent=0.9,
    )

    def run(model) -> torch.Tensor:
        (latents,) = run_node(
            "KSampler",
            model=model,
            seed=7,
            steps=4,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            positive=positive,
            negative=negative,
            latent_image=latent,
            **{"cfg": 3.0, **settings},
        )
        return latents["samples"]

    return relative_l2(run(models.ours), run(models.stock))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("size", [(16, 16), (15, 17)], ids=["even", "odd"])
def test_runs(run_node, models, size, cfg):
    assert _difference(run_node, models, models.net, empty_latent(1, *size), cfg=cfg) <= PER_RUN


def test_batch_and_prompts_of_different_length(run_node, models):
    assert _difference(run_node, models, models.net, empty_latent(2, 10, 14), longer=31) <= PER_RUN


def test_the_older_node_for_both_sides_at_once(run_node, models, monkeypatch):
    """The negative prompt gets its ControlNet after it was encoded, and is still one batch with the other."""
    from comfy_xdit.remote.model import RemoteModel

    denoise, batches = RemoteModel.denoise, []
    monkeypatch.setattr(
        RemoteModel,
        "denoise",
        lambda self, **call: batches.append(call["x"].shape[0]) or denoise(self, **call),
    )
    for length, expected in ((12, [2] * 3), (20, [1] * 6)):
        (positive,) = run_node(
            "ControlNetApply",
            conditioning=random_conditioning(models.ours, 1),
            control_net=models.net,
            image=_hint(10, 14),
            strength=0.8,
        )
        negative = random_conditioning(models.ours, 2, length)
        pictures = [
            run_node("KSampler", model=model, positive=positive, negative=negative, **_SHORT)[0]["samples"]
            for model in (models.ours, models.stock)
        ]
        assert relative_l2(*pictures) <= PER_RUN
        assert batches == expected
        batches.clear()


def test_one_after_another(run_node, models):
    second = models.net.copy()
    second.set_cond_hint(_hint(16, 16).movedim(-1, 1), 0.5)
    first = models.net.copy().set_previous_controlnet(second)

    assert _difference(run_node, models, first, empty_latent()) <= PER_RUN


def test_one_call(run_node, models):
    """The residuals change much, and our MODEL follows them exactly."""
    guidance = {"guidance": torch.full((2,), 3.5)} if "guidance" in models.net.extra_conds else {}

    def call(patcher, control) -> torch.Tensor:
        ((context, options),) = random_conditioning(models.ours, 1)
        patcher.patch_model(load_weights=False)
        with torch.inference_mode():
            return patcher.model.apply_model(
                random_latent(2, 15, 17),
                torch.full((2,), 0.7),
                c_crossattn=context.expand(2, -1, -1),
                y=options["pooled_output"].expand(2, -1),
                control=control,
                transformer_options={},  # the default is one dict for all, in which stock Flux leaves notes
                **guidance,
            )

    width = models.net.control_model.hidden_size
    residual, other = (torch.randn(2, 72, width, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    control = {"input": [residual, None], "output": [residual, other, residual]}

    expected = call(models.stock, control)

    assert relative_l2(call(models.ours, control), expected) <= PER_CALL
    assert relative_l2(call(models.ours, None), expected) > 0.01


@pytest.mark.parametrize("double_y", [False, True], ids=["large", "double_y"])
@pytest.mark.parametrize("source", ["native", "diffusers"])
def test_sd35_takes_embedders_over_from_the_model(run_node, tiny_sd3, tiny_sd3_diffusers, double_y, source):
    """Such a ControlNet reads two layers of the transformer, whose weights are in the ranks."""
    import comfy.cldm.dit_embedder
    import comfy.controlnet
    import comfy.ops

    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel",
        unet_name=tiny_sd3 if source == "native" else tiny_sd3_diffusers,
        weight_dtype="default",
        parallel=layout(1),
    )
    pooled = random_conditioning(ours, 1)[0][1]["pooled_output"].shape[1]
    module = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None, patch_size=2, in_chans=16, attention_head_dim=64, num_attention_heads=4,
        adm_in_channels=pooled, num_layers=2, main_model_double=4, double_y_emb=double_y,
        device=torch.device("cpu"), dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    net = comfy.controlnet.ControlNetSD35(
        tiny.randomise(module, 5), compression_ratio=1, load_device=torch.device("cpu")
    )

    assert _difference(run_node, SimpleNamespace(stock=stock, ours=ours), net, empty_latent()) <= PER_RUN


def test_an_embedder_is_lent_and_nothing_else(run_node, tiny_sd3):
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    transformer = ours.model.diffusion_model

    assert {t.device.type for t in transformer.x_embedder.state_dict().values()} == {"cpu"}
    assert {t.device.type for t in transformer.state_dict().values()} == {"meta"}
