"""The demo ControlNet in stock ComfyUI: its own loader and nodes, before our MODEL and the stock one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from check_demo_pictures import FOLLOWED, edge_overlap
from PIL import Image

from comfy_xdit.headless.pictures import load
from comfy_xdit.ranks.environment import ROOT
from tests.comfyui.inputs import DEMO, layout, relative_l2

STOCK = ROOT / "workflows" / "api" / "demo_controlnet_stock.json"
OURS = ROOT / "workflows" / "api" / "demo_controlnet.json"
HINT = DEMO / "demo_edges.png"
PER_RUN = 1e-4


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    """The nodes of the shipped workflow with stock nodes, by id."""
    return json.loads(STOCK.read_text())


@pytest.fixture
def net(comfyui: SimpleNamespace, graph) -> str:
    """The shipped file, where the workflow says it must be copied to."""
    name = graph["12"]["inputs"]["control_net_name"]
    place = Path(comfyui.models) / "controlnet" / name
    if not place.exists():
        place.symlink_to(DEMO / "controlnet" / "diffusion_pytorch_model.safetensors")
    return name


Applied = Callable[[Any, Any], tuple[Any, Any]]


def drawn(run_node, graph, pipeline, model, applied: Applied | None) -> SimpleNamespace:
    """What the workflow draws with a MODEL: the latent, and the picture (128, 128, 3), uint8.

    `applied` puts a ControlNet on both conditionings.
    """
    _, clip, vae = pipeline
    pair = tuple(run_node("CLIPTextEncode", clip=clip, **widgets(graph, node))[0] for node in ("6", "7"))
    positive, negative = applied(*pair) if applied else pair
    (latent,) = run_node("EmptySD3LatentImage", **widgets(graph, "5"))
    (samples,) = run_node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **widgets(graph, "3"),
    )
    (image,) = run_node("VAEDecode", samples=samples, vae=vae)
    return SimpleNamespace(latent=samples["samples"], picture=(image[0] * 255).round().byte().numpy())


def widgets(graph, node: str) -> dict[str, Any]:
    """The inputs of a node that are no links."""
    return {name: value for name, value in graph[node]["inputs"].items() if not isinstance(value, list)}


def test_stock_nodes_read_the_file_and_our_nodes_draw_the_same(run_node, graph, net, demo_sd3):
    pipeline = run_node(
        "XDiTLoadPipeline", pipeline="demo (comfy_xdit)", weight_dtype="default", parallel=layout(1)
    )
    (stock,) = run_node("UNETLoader", unet_name=demo_sd3, weight_dtype="default")
    given = {"image": load(HINT)[0], "vae": pipeline[2]}
    with Image.open(HINT) as image:
        edges = np.asarray(image)

    def by_stock_nodes(positive, negative):
        (net,) = run_node("ControlNetLoader", **widgets(graph, "12"))
        given["control_net"] = net
        return run_node(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, **given, **widgets(graph, "13")
        )

    def by_our_nodes(*pair):
        ours = json.loads(OURS.read_text())
        (net,) = run_node("XDiTControlNetLoader", **widgets(ours, "10"))
        given["control_net"] = net
        return tuple(
            run_node("XDiTControlNetApply", conditioning=one, **given, **widgets(ours, node))[0]
            for one, node in zip(pair, ("12", "13"), strict=True)
        )

    expected = drawn(run_node, graph, pipeline, stock, by_stock_nodes)

    assert edge_overlap(edges, expected.picture) >= FOLLOWED
    for applied in (by_stock_nodes, by_our_nodes):
        ours = drawn(run_node, graph, pipeline, pipeline[0], applied)
        assert relative_l2(ours.latent, expected.latent) <= PER_RUN
    without = drawn(run_node, graph, pipeline, pipeline[0], None)
    assert edge_overlap(edges, without.picture) < FOLLOWED


def test_it_says_in_comfyui_what_it_says_in_diffusers(run_node, net):
    """Residuals of both networks for the same inputs: one, which goes behind the first block."""
    from diffusers import SD3ControlNetModel

    (loaded,) = run_node("ControlNetLoader", control_net_name=net)
    theirs = loaded.control_model.float()
    with torch.inference_mode(False):
        reference = SD3ControlNetModel.from_pretrained(DEMO / "controlnet").float()
    random = torch.Generator().manual_seed(3)
    x, hint = (torch.randn(2, 16, 16, 16, generator=random) for _ in range(2))
    context, timestep = torch.randn(2, 16, 128, generator=random), torch.tensor([700.0, 30.0])
    pooled = torch.randn(2, 128, generator=random)
    with torch.inference_mode():
        actual = theirs(x=x, timesteps=timestep, y=pooled, context=context, hint=hint)["output"]
        (expected,) = reference(
            hidden_states=x,
            controlnet_cond=hint,
            timestep=timestep,
            encoder_hidden_states=context,
            pooled_projections=torch.zeros_like(pooled),
        ).controlnet_block_samples
    assert len(actual) == 1
    assert expected.std() > 0.01
    assert relative_l2(actual[0], expected) <= 1e-5
