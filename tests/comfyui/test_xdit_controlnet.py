"""ControlNets in the ranks: the same graph as with stock nodes, before our MODEL and before the stock one."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.registry import worker_group
from tests import controlnets
from tests.comfyui.inputs import (
    FAMILIES,
    empty_latent,
    layout,
    pair,
    random_conditioning,
    relative_l2,
)

SAME = 3e-5
NETS = {"sd3": ("sd3", {}), "flux": ("flux", {"num_layers": 1, "num_single_layers": 1})}
HEIGHT, WIDTH = 15, 17  # of the latent: odd, so that patches are padded
SETTINGS = {
    "seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
}  # fmt: skip


def write_net(comfyui, name: str, **changes: Any) -> str:
    """A random ControlNet of NETS in models/controlnet; its name for the loaders."""
    kind, config = NETS[name]
    file = f"{name}_{len(changes)}_{changes.get('seed', 0)}.safetensors"
    _, cls, known, seed = controlnets.NETS[kind]
    with torch.inference_mode(False):
        module = controlnets.made(cls, {**known, **config}, changes.get("seed", seed))
        save_file(controlnets.tensors(module), comfyui.models / "controlnet" / file)
    return file


def picture(height: int = 70, width: int = 90, batch: int = 1) -> torch.Tensor:
    """A hint of another size and aspect than the latent."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def vae(run_node):
    (vae,) = run_node("XDiTLoadVAE", vae_name="demo_vae (comfy_xdit).safetensors", parallel=layout(1))
    return vae


@pytest.fixture(scope="module")
def files(comfyui) -> dict[str, str]:
    return {name: write_net(comfyui, name) for name in NETS}


@pytest.fixture(params=FAMILIES)
def models(request, run_node, degrees, files) -> SimpleNamespace:
    """The same model file loaded by ComfyUI and into the ranks, and the same ControlNet file."""
    models = pair(run_node, request.getfixturevalue(f"tiny_{request.param}"), degrees)
    models.vae = vae_of(run_node, degrees)
    (models.stock_net,) = run_node("ControlNetLoader", control_net_name=files[request.param])
    (models.our_net,) = run_node("XDiTControlNetLoader", control_net_name=files[request.param])
    return models


def vae_of(run_node, degrees):
    (vae,) = run_node("XDiTLoadVAE", vae_name="demo_vae (comfy_xdit).safetensors", parallel=layout(**degrees))
    return vae


def prompts(models, longer: int = 12):
    return random_conditioning(models.ours, 1), random_conditioning(models.ours, 2, longer)


def by_stock(run_node, models, sides, net=None, image=None, start=0.2, end=0.7, strength=0.8):
    return run_node(
        "ControlNetApplyAdvanced", positive=sides[0], negative=sides[1], control_net=net or models.stock_net,
        image=picture() if image is None else image, strength=strength, start_percent=start, end_percent=end,
        vae=models.vae,
    )  # fmt: skip


def by_ours(run_node, models, sides, net=None, image=None, start=0.2, end=0.7, strength=0.8):
    image = picture() if image is None else image
    return tuple(
        run_node(
            "XDiTControlNetApply", conditioning=side, control_net=net or models.our_net, image=image,
            strength=strength, start=start, end=end, vae=models.vae,
        )[0]
        for side in sides
    )  # fmt: skip


def sampled(run_node, model, sides, node="KSampler", batch: int = 1, **settings) -> torch.Tensor:
    (latent,) = run_node(node, model=model, **sampling(sides, batch, settings))
    return latent["samples"]


def driven(run_node, model, sides) -> tuple[torch.Tensor, str]:
    """By XDiTSampler, of what the ranks' loop cannot run; and what the node says."""
    answer = run_node("XDiTSampler", model=model, **sampling(sides, 1, {}))
    return answer["result"][0]["samples"], answer["ui"]["text"][0]


def sampling(sides, batch, settings) -> dict[str, Any]:
    latent = empty_latent(batch, HEIGHT, WIDTH)
    return {"positive": sides[0], "negative": sides[1], **SETTINGS, "latent_image": latent, **settings}


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """Every call of a transformer in the ranks: rows, nets, and hints that travelled."""
    from comfy_xdit.protocol.messages import Keep
    from comfy_xdit.remote.model import RemoteModel
    from comfy_xdit.remote.sent import SentTensors

    seen: list[SimpleNamespace] = []
    denoise, refer = RemoteModel.denoise, SentTensors.refer

    def counted(self, conditions, generation):
        referred = refer(self, conditions, generation)
        hints = referred.get("hints of ControlNets", [])
        seen[-1].hints += sum(isinstance(hint, Keep) for hint in hints)
        return referred

    def called(self, **call):
        seen.append(SimpleNamespace(rows=call["x"].shape[0], nets=len(call["nets"]), hints=0))
        return denoise(self, **call)

    monkeypatch.setattr(RemoteModel, "denoise", called)
    monkeypatch.setattr(SentTensors, "refer", counted)
    return seen


def test_the_same_graph(run_node, models, calls):
    """Stock net and MODEL, stock net and our MODEL, ours under both samplers, and ours in the stock node."""
    plain = prompts(models, 12)
    stock, ours = by_stock(run_node, models, plain), by_ours(run_node, models, plain)
    expected = sampled(run_node, models.stock, stock)

    assert relative_l2(sampled(run_node, models.ours, ours), expected) <= SAME
    assert [call.nets for call in calls] == [0, 1, 1, 0]  # 0.2 to 0.7 of the run
    assert [call.rows for call in calls] == [2] * 4
    assert sum(call.hints for call in calls) == 1
    assert relative_l2(sampled(run_node, models.ours, ours, "XDiTSampler"), expected) <= SAME
    stock_node = by_stock(run_node, models, plain, models.our_net)
    assert relative_l2(sampled(run_node, models.ours, stock_node), expected) <= SAME
    assert relative_l2(sampled(run_node, models.ours, stock_node, "XDiTSampler"), expected) <= SAME
    without = sampled(run_node, models.stock, plain)
    assert relative_l2(expected, without) > 0.01
    assert relative_l2(sampled(run_node, models.ours, plain), without) <= SAME


def test_prompts_of_two_lengths_stay_one_call(run_node, models, calls):
    plain = prompts(models, 31)
    ours = by_ours(run_node, models, plain)
    expected = sampled(run_node, models.stock, by_stock(run_node, models, plain), batch=2)

    assert relative_l2(sampled(run_node, models.ours, ours, batch=2), expected) <= SAME
    assert [call.rows for call in calls] == [4] * 4


@pytest.mark.parametrize("node", ["KSampler", "XDiTSampler"])
def test_on_one_side_and_one_hint_per_picture(run_node, models, node):
    plain, image = prompts(models), picture(batch=2)
    stock, ours = (apply(run_node, models, plain, image=image) for apply in (by_stock, by_ours))
    expected = sampled(run_node, models.stock, (stock[0], plain[1]), batch=2)

    assert relative_l2(sampled(run_node, models.ours, (ours[0], plain[1]), node, batch=2), expected) <= SAME


def test_in_an_area_and_everywhere_else(run_node, models, calls):
    """The hint is scaled to what is drawn: the whole picture, and a part of it."""

    def positive(apply):
        everywhere, part = (apply(run_node, models, (side,) * 2)[0] for side in prompts(models))
        (part,) = run_node(
            "ConditioningSetArea", conditioning=part, width=64, height=80, x=16, y=8, strength=0.9
        )
        return [*everywhere, *part]

    negative = prompts(models)[1]
    expected = sampled(run_node, models.stock, (positive(by_stock), negative))

    assert relative_l2(sampled(run_node, models.ours, (positive(by_ours), negative)), expected) <= SAME
    assert sum(call.hints for call in calls) == 2


def test_with_a_stock_one_before_or_behind(run_node, models):
    plain, other = prompts(models), picture(40, 40)
    stock = by_stock(run_node, models, by_stock(run_node, models, plain), image=other, strength=0.5)
    expected = sampled(run_node, models.stock, stock)

    before = by_stock(run_node, models, by_ours(run_node, models, plain), image=other, strength=0.5)
    behind = by_ours(run_node, models, by_stock(run_node, models, plain), image=other, strength=0.5)

    assert relative_l2(sampled(run_node, models.ours, before), expected) <= SAME
    assert relative_l2(sampled(run_node, models.ours, behind), expected) <= SAME
    drawn, said = driven(run_node, models.ours, behind)
    assert relative_l2(drawn, expected) <= SAME and "has a stock ControlNet (control)" in said


def test_two_of_ours(run_node, models, calls):
    plain, other = prompts(models), picture(40, 40)
    stacked = [
        apply(run_node, models, apply(run_node, models, plain), image=other, strength=0.5, start=0.0, end=1.0)
        for apply in (by_stock, by_ours)
    ]
    expected = sampled(run_node, models.stock, stacked[0])

    assert relative_l2(sampled(run_node, models.ours, stacked[1]), expected) <= SAME
    assert [call.nets for call in calls] == [1, 2, 2, 1]
    assert [call.rows for call in calls] == [2] * 4
    assert relative_l2(sampled(run_node, models.ours, stacked[1], "XDiTSampler"), expected) <= SAME


def test_a_stock_model_does_not_ignore_it(run_node, models):
    ours = by_ours(run_node, models, prompts(models))

    with pytest.raises(InvalidInput, match=r"is in the ranks, and this MODEL is a stock one.*load the MODEL"):
        sampled(run_node, models.stock, ours)

    with pytest.raises(InvalidInput, match=r"is in the ranks, and this MODEL is a stock one"):
        sampled(run_node, models.stock, by_stock(run_node, models, ours, image=picture(40, 40)))


def test_interrupt_leaves_the_ranks_warm(run_node, models, degrees):
    management = importlib.import_module("comfy.model_management")
    ours = by_ours(run_node, models, prompts(models))
    before, pids = sampled(run_node, models.ours, ours), list(worker_group(layout(**degrees)).pids)

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        sampled(run_node, models.ours, ours)

    assert torch.equal(sampled(run_node, models.ours, ours), before)
    assert worker_group(layout(**degrees)).pids == pids


@pytest.mark.parametrize("form", ["xlabs", "union", "union without a type"])
@pytest.mark.parametrize("node", ["KSampler", "XDiTSampler"])
def test_other_flux_controlnets(comfyui, run_node, tiny_flux, degrees, form, node):
    """A hint of pixels, and control types, as the stock loader reads the same file."""
    pixels, file = form == "xlabs", f"{form}.safetensors"
    # Stock nodes take FLUX.1's 19 blocks for granted: one residual, or as many as there are blocks in turns.
    config = controlnets.PIXELS if pixels else {**controlnets.UNION, "num_layers": 1}
    with torch.inference_mode(False):
        module = controlnets.made("FluxControlNetModel", config, 21)
        tensors = controlnets.xlabs(module) if pixels else controlnets.tensors(module)
        save_file(tensors, comfyui.models / "controlnet" / file)
    models = pair(run_node, tiny_flux, degrees)
    models.vae = None if pixels else vae_of(run_node, degrees)
    nets = [run_node(n, control_net_name=file)[0] for n in ("ControlNetLoader", "XDiTControlNetLoader")]
    if form == "union":
        nets = [run_node("SetUnionControlNetType", control_net=net, type="depth")[0] for net in nets]
    stock, ours = (by_stock(run_node, models, prompts(models), net) for net in nets)
    size = {"latent_image": empty_latent(1, 16, 12)}  # stock nodes cannot scale pixels to an odd latent

    expected = sampled(run_node, models.stock, stock, **size)

    assert relative_l2(sampled(run_node, models.ours, ours, node, **size), expected) <= SAME
    assert relative_l2(sampled(run_node, models.stock, prompts(models), **size), expected) > 0.003


# ---------------------------------------------------------------------- refused


@pytest.fixture
def one(run_node, tiny_sd3, files) -> SimpleNamespace:
    models = pair(run_node, tiny_sd3, {"ulysses_degree": 1})
    models.vae = vae_of(run_node, {"ulysses_degree": 1})
    (models.our_net,) = run_node("XDiTControlNetLoader", control_net_name=files["sd3"])
    (models.stock_net,) = run_node("ControlNetLoader", control_net_name=files["sd3"])
    return models


def test_a_stock_net_in_our_node(run_node, one):
    with pytest.raises(InvalidInput, match=r"is no ControlNet of the ranks.*or apply it with the stock node"):
        by_ours(run_node, one, prompts(one), net=one.stock_net)


def test_no_vae(run_node, one):
    plain, vae, one.vae = prompts(one), one.vae, None
    with pytest.raises(InvalidInput, match="latents of a VAE, and no VAE is connected; connect"):
        by_ours(run_node, one, plain)
    applied = by_stock(run_node, one, plain, one.our_net)
    with pytest.raises(InvalidInput, match="latents of a VAE, and no VAE is connected; connect"):
        sampled(run_node, one.ours, applied)
    one.vae = vae
    sampled(run_node, one.ours, by_ours(run_node, one, plain))


def test_a_vae_of_another_model(run_node, one):
    one.vae = SimpleNamespace(
        encode=lambda pixels: torch.zeros(1, 4, HEIGHT, WIDTH), spacial_compression_encode=lambda: 8
    )
    with pytest.raises(
        InvalidInput, match=r"latents of shape \(1, 4, 15, 17\).*connect the VAE of this model"
    ):
        sampled(run_node, one.ours, by_ours(run_node, one, prompts(one)))


def test_a_control_type_that_it_has_not(run_node, one):
    with pytest.raises(InvalidInput, match="has no control types, and control type 2 is chosen"):
        run_node(
            "XDiTControlNetApply", conditioning=prompts(one)[0], control_net=one.our_net, image=picture(),
            strength=1.0, start=0.0, end=1.0, vae=one.vae, control_type="depth (2)",
        )  # fmt: skip
    (typed,) = run_node("SetUnionControlNetType", control_net=one.our_net, type="depth")
    with pytest.raises(InvalidInput, match="has no control types, and control type 1 is chosen"):
        sampled(run_node, one.ours, by_stock(run_node, one, prompts(one), typed))


def test_the_older_node_for_both_sides(run_node, one):
    plain = prompts(one)

    def latent(net, model, node="KSampler"):
        (positive,) = run_node(
            "ControlNetApply", conditioning=plain[0], control_net=net, image=picture(), strength=0.8
        )
        positive[0][1]["control"].vae = one.vae  # the node has no input for it
        return sampled(run_node, model, (positive, plain[1]), node)

    expected = latent(one.stock_net, one.stock)
    assert relative_l2(latent(one.our_net, one.ours), expected) <= SAME
    assert relative_l2(latent(one.our_net, one.ours, "XDiTSampler"), expected) <= SAME
