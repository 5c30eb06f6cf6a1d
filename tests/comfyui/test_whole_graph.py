"""A graph with LoRA, ControlNet and parallel VAE of ours against the same graph of stock nodes.

Tolerance: relative L2 of 3e-5 for the latent after four steps, as for every sampler (docs/comfyui.md), and of
1e-4 for the picture: the random VAE that draws it makes several times more of a difference.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui import loras
from tests.comfyui.inputs import FAMILIES, empty_latent, pair, random_conditioning, relative_l2
from tests.comfyui.test_vae import kl
from tests.comfyui.test_xdit_controlnet import layout, picture, write_net

LATENT, PICTURE = 3e-5, 1e-4
STEPS = 4
ALL = {"lora": 0.7, "net": 0.8}


@pytest.fixture(scope="module")
def vae(comfyui: SimpleNamespace) -> SimpleNamespace:
    return kl(comfyui)


@pytest.fixture(params=FAMILIES)
def graph(request, comfyui, run_node, degrees, vae) -> SimpleNamespace:
    """One model, LoRA, ControlNet and VAE file, each loaded by stock nodes and by ours."""
    family = request.param
    models = pair(run_node, request.getfixturevalue(f"tiny_{family}"), degrees)
    lora, net = f"whole_{family}.safetensors", write_net(comfyui, family)
    with torch.inference_mode(False):
        save_file(loras.native(models.stock, "lora", 5), comfyui.models / "loras" / lora)
    (our_vae,) = run_node("XDiTLoadVAE", vae_name=vae.name, parallel=layout(**degrees))
    (stock_net,) = run_node("ControlNetLoader", control_net_name=net)
    (our_net,) = run_node("XDiTControlNetLoader", control_net_name=net)
    prompts = random_conditioning(models.ours, 1), random_conditioning(models.ours, 2)
    return SimpleNamespace(
        run=run_node, lora=lora, prompts=prompts,
        stock=SimpleNamespace(model=models.stock, vae=vae.stock, net=stock_net),
        ours=SimpleNamespace(model=models.ours, vae=our_vae, net=our_net),
    )  # fmt: skip


def by_stock(graph: SimpleNamespace, lora: float, net: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and picture of the stock graph."""
    side, run = graph.stock, graph.run
    (model,) = run("LoraLoaderModelOnly", model=side.model, lora_name=graph.lora, strength_model=lora)
    positive, negative = run(
        "ControlNetApplyAdvanced", positive=graph.prompts[0], negative=graph.prompts[1], control_net=side.net,
        image=picture(), strength=net, start_percent=0.0, end_percent=0.6, vae=side.vae,
    )  # fmt: skip
    return drawn(graph, model, positive, negative, "KSampler", side.vae)


def by_ours(graph: SimpleNamespace, sampler: str = "KSampler") -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and picture of the graph with our nodes."""
    side, run = graph.ours, graph.run
    outputs = run("XDiTLoraLoader", model=side.model, lora_name=graph.lora, strength_model=ALL["lora"])
    image = picture()
    positive, negative = (
        run(
            "XDiTControlNetApply", conditioning=prompt, control_net=side.net, image=image,
            strength=ALL["net"], start=0.0, end=0.6, vae=side.vae,
        )[0]
        for prompt in graph.prompts
    )  # fmt: skip
    return drawn(graph, outputs["result"][0], positive, negative, sampler, side.vae)


def drawn(
    graph: SimpleNamespace, model: Any, positive: Any, negative: Any, sampler: str, vae: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    (latent,) = graph.run(
        sampler, model=model, seed=3, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=empty_latent(1, 18, 14), denoise=1.0,
    )  # fmt: skip
    (pixels,) = graph.run("VAEDecode", samples=latent, vae=vae)
    return latent["samples"], pixels


def test_the_same_pictures(graph: SimpleNamespace):
    expected, pixels = by_stock(graph, **ALL)
    for sampler in ("KSampler", "XDiTSampler"):
        latent, ours = by_ours(graph, sampler)
        assert relative_l2(latent, expected) <= LATENT, sampler
        assert relative_l2(ours, pixels) <= PICTURE, sampler
    for name in ALL:
        without, _ = by_stock(graph, **{**ALL, name: 0.0})
        assert relative_l2(without, expected) > 100 * LATENT, f"{name} does nothing"


def test_an_interrupt_leaves_the_ranks_and_the_result_as_they_were(graph: SimpleNamespace, monkeypatch):
    import comfy.model_management as management

    from comfy_xdit.ranks.registry import running_groups
    from comfy_xdit.remote.model import RemoteModel

    before = by_ours(graph)
    pids, denoise, calls = [list(group.pids) for group in running_groups()], RemoteModel.denoise, []

    def stopping(self: RemoteModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        management.interrupt_current_processing(len(calls) == 2)
        return denoise(self, *args, **kwargs)

    monkeypatch.setattr(RemoteModel, "denoise", stopping)
    with pytest.raises(management.InterruptProcessingException):
        by_ours(graph)
    assert len(calls) == 2 < STEPS
    monkeypatch.undo()
    assert all(map(torch.equal, by_ours(graph), before))
    assert [list(group.pids) for group in running_groups()] == pids
