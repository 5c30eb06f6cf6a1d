"""Wrong ControlNet files, hints and pictures: each names what is wrong, and nothing that runs is lost."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.controlnet import apply_controlnet, open_controlnet
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import controlnets, tiny
from tests.controlnets import NETS, applied, hint_for, made, random
from tests.pipefusion_runs import request as run_request

TWO = ParallelConfig(ulysses_degree=2)


def at(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(4, 4) for name in names}


FLUX_NAMES = ("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "x_embedder.weight")
# Tensors of a file, and words of the error of the loader node.
FILES = {
    "no tensors": ({}, r"holds no tensors; download it again"),
    "LoRA": (at("transformer.x.lora_A.weight"), r"is a LoRA, no ControlNet; load it with xDiT Lora Loader"),
    "a Flux model": (at("double_blocks.0.img_attn.qkv.weight"), r"is a diffusion model, no ControlNet"),
    "SD1.5": (at("controlnet_cond_embedding.conv_in.weight"), r"for SD1.5, SD2 or SDXL.*choose a Contr"),
    "SD1.5, original": (at("control_model.zero_convs.0.0.weight"), r"is a ControlNet for SD1.5, SD2 or SDXL"),
    "Control-LoRA": (at("lora_controlnet"), r"is a Control-LoRA for SDXL"),
    "HunyuanDiT": (at("input_block.weight", FLUX_NAMES[0]), r"HunyuanDiT, a family the ranks do not have"),
    "PixArt": (at("controlnet_blocks.0.after_proj.weight"), r"for PixArt, a family the ranks do not have"),
    "Qwen-Image": (at("transformer_blocks.0.img_mlp.net.0.proj.weight", *FLUX_NAMES), r"for Qwen-Image"),
    "MistoLine": (at("controlnet_blocks.0.linear.weight"), r"a MistoLine.*use the stock ControlNet nodes"),
    "SD3.5 large, Stability": (
        at("transformer_blocks.0.adaLN_modulation.1.bias", "pos_embed_input.proj.weight", FLUX_NAMES[0]),
        r"Stability's format for SD3.5 large.*use the stock ControlNet nodes",
    ),
    "SD3.5 large, diffusers": (
        at("pos_embed_input.proj.weight", FLUX_NAMES[0]),
        r"for SD3.5 large without a prompt of its own.*use the stock ControlNet nodes",
    ),
    "inpainting, Flux": (
        {name: torch.zeros(4, width) for name, width in zip(FLUX_NAMES, (4, 68, 64), strict=True)},
        r"hint of 17 channels beside a picture of 16: an inpainting ControlNet",
    ),
    "short shape, Flux": (
        {name: torch.zeros(4) for name in FLUX_NAMES},
        r"controlnet_x_embedder\.weight has shape \(4,\), a ControlNet has a matrix there; .*again",
    ),
    "short shape, union": (
        at(*FLUX_NAMES) | {"controlnet_mode_embedder.weight": torch.ones(())},
        r"controlnet_mode_embedder\.weight has shape \(\), a ControlNet has a matrix there",
    ),
    "short shape, SD3": (
        at("context_embedder.weight", FLUX_NAMES[0]) | {"pos_embed_input.proj.weight": torch.ones(1)},
        r"pos_embed_input\.proj\.weight has shape \(1,\), a ControlNet has a matrix there",
    ),
    "something else": (at("encoder.weight"), r"no ControlNet that runs in the ranks: its 1 tensors begin"),
}  # fmt: skip
BYTES = {
    "no bytes.safetensors": (b"", r"\(0 bytes\) is damaged or not a safetensors file"),
    "text.safetensors": (b"<html>404</html>", r"is damaged or not a safetensors file.*download it again"),
    "pickle.pth": (b"\x80\x04", r"pickle file, which can run code; convert it on a machine you trust"),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return controlnets.write_nets(tmp_path_factory.mktemp("controlnets"))


@pytest.fixture(scope="module")
def remote(tiny_models):
    remote = RemoteModel(ModelSpec.of(tiny_models["flux"].file, "transformer"), TWO)
    remote.load()
    return remote


@pytest.fixture
def call(tiny_models):
    model = tiny_models["flux"]
    return random(1, 16, 6, 10, seed=1), torch.full((1,), 0.7), tiny.conditions(model.family, model.config, 5)


@pytest.fixture
def survives(remote, call, nets):
    """The same processes draw the same, to the bit, before and after, with and without a ControlNet."""
    good = (applied(nets["flux"], hint_for(nets["flux"], call[0])),)
    before = remote.denoise(*call), remote.denoise(*call, nets=good)
    pids = list(worker_group(TWO).pids)
    yield
    after = remote.denoise(*call), remote.denoise(*call, nets=good)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert worker_group(TWO).pids == pids


# ---------------------------------------------------------------------- at the loader node


@pytest.mark.parametrize("what", FILES)
def test_a_header_that_is_no_controlnet_for_the_ranks(tmp_path, what):
    tensors, words = FILES[what]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidInput, match=rf"bad\.safetensors.*{words}"):
        open_controlnet(str(tmp_path / "bad.safetensors"), HEADLESS)


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_safetensors(tmp_path, name):
    content, words = BYTES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        open_controlnet(str(tmp_path / name), HEADLESS)


def test_truncated_missing_and_empty_folder(tmp_path, nets):
    (tmp_path / "half.safetensors").write_bytes(nets["flux"].file.read_bytes()[:9000])
    with pytest.raises(InvalidInput, match=r"half\.safetensors \(9000 bytes\) is damaged"):
        open_controlnet(str(tmp_path / "half.safetensors"), HEADLESS)
    with pytest.raises(InvalidInput, match=r"no ControlNet '.*gone.safetensors'; give the path"):
        open_controlnet(str(tmp_path / "gone.safetensors"), HEADLESS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput, match=r"no \.safetensors file in .*folder"):
        open_controlnet(str(tmp_path / "folder"), HEADLESS)


# ---------------------------------------------------------------------- at the first call in the ranks


def changed(nets, tmp_path, **config) -> ControlNet:
    """The Flux net with another configuration."""
    file = tmp_path / "bad.safetensors"
    save_file(controlnets.tensors(made(NETS["flux"][1], {**controlnets.FLUX, **config}, 1)), file)
    return ControlNet.of(file)


def edited(nets, tmp_path, edit) -> ControlNet:
    """The Flux net with other tensors."""
    tensors = load_file(nets["flux"].file)
    edit(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return ControlNet.of(tmp_path / "bad.safetensors")


def _damage(tensors) -> None:
    tensors["controlnet_blocks.0.weight"][3, 3] = math.nan


def _narrow(tensors) -> None:
    tensors["controlnet_single_blocks.1.weight"] = torch.zeros(128, 64)


WRONG = {
    "another width": (
        lambda *a: changed(*a, num_attention_heads=2),
        r"bad\.safetensors is 64 wide, the MODEL 128; choose a ControlNet made for this model",
    ),
    "another text encoder": (
        lambda *a: changed(*a, joint_attention_dim=32),
        r"takes prompts 32 wide, the MODEL 64",
    ),
    "another pooled prompt": (
        lambda *a: changed(*a, pooled_projection_dim=16),
        r"takes pooled prompts 16 wide, the MODEL 32",
    ),
    "another latent": (
        lambda *a: changed(*a, in_channels=16),
        r"takes latents of 16 numbers per token or pixel, the MODEL 64",
    ),
    "more blocks": (lambda *a: changed(*a, num_layers=3), r"has 3 blocks \(num_layers\), the MODEL 2"),
    "more single blocks": (
        lambda *a: changed(*a, num_single_layers=4),
        r"has 4 blocks \(num_single_layers\), the MODEL 3",
    ),
    "a missing tensor": (
        lambda *a: edited(*a, lambda t: t.pop("controlnet_blocks.0.bias")),
        r"bad\.safetensors lacks the tensor controlnet_blocks\.0\.bias; the file is incomplete",
    ),
    "no embedder": (
        lambda *a: edited(*a, lambda t: t.pop("context_embedder.weight")),
        r"bad\.safetensors lacks 'context_embedder.weight'; the file is incomplete",
    ),
    "a narrow tensor": (
        lambda *a: edited(*a, _narrow),
        r"controlnet_single_blocks\.1\.weight has shape \(128, 64\), the model needs \(128, 128\)",
    ),
    "NaN": (
        lambda *a: edited(*a, _damage),
        r"controlnet_blocks\.0\.weight holds values that are not finite in torch.float32",
    ),
    "another family": (
        lambda nets, _: nets["sd3"].spec,
        r"sd3\.safetensors is a ControlNet for sd3, the MODEL is flux; choose a ControlNet for flux",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_controlnet_that_does_not_fit(remote, call, nets, survives, tmp_path, what):
    write, words = WRONG[what]
    net = replace(applied(nets["flux"], random(1, 16, 6, 10, seed=2)), net=write(nets, tmp_path))
    with pytest.raises(InvalidInput, match=words):
        remote.denoise(*call, nets=(net,))


def test_a_file_that_has_changed_since(remote, call, nets, survives, tmp_path):
    spec = changed(nets, tmp_path)
    os.utime(spec.path, ns=(1, 1))
    net = replace(applied(nets["flux"], random(1, 16, 6, 10, seed=2)), net=spec)
    with pytest.raises(
        InvalidInput, match=r"bad.safetensors was changed after the node .*run the workflow again"
    ):
        remote.denoise(*call, nets=(net,))


def test_a_config_that_belongs_to_another_file(remote, call, nets, survives, tmp_path):
    spec = changed(nets, tmp_path)
    words = {"_class_name": "FluxControlNetModel", "num_attention_heads": 24, "attention_head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(words))
    net = replace(applied(nets["flux"], random(1, 16, 6, 10, seed=2)), net=ControlNet.of(spec.path))
    with pytest.raises(
        InvalidInput, match=r"config.json says 24 heads of 128, and bad.safetensors is 128 wide"
    ):
        remote.denoise(*call, nets=(net,))


HINTS = {
    "channels": (random(1, 4, 6, 10, seed=2), r"has shape \(1, 4, 6, 10\), it takes \(1 or 1, 16, 6, 10\)"),
    "size": (random(1, 16, 6, 8, seed=2), r"has shape \(1, 16, 6, 8\).*use the VAE of this model"),
    "batch": (random(3, 16, 6, 10, seed=2), r"has shape \(3, 16, 6, 10\).*one hint or one per picture"),
    "dimensions": (random(16, 6, 10, seed=2), r"has shape \(16, 6, 10\)"),
    "NaN": (
        torch.full((1, 16, 6, 10), math.nan),
        r"hint for flux.safetensors holds values that are not finite",
    ),
}


@pytest.mark.parametrize("what", HINTS)
def test_hints(remote, call, nets, survives, what):
    hint, words = HINTS[what]
    with pytest.raises(InvalidInput, match=words):
        remote.denoise(*call, nets=(applied(nets["flux"], hint),))


@pytest.mark.parametrize(("name", "modes"), [("flux union", 3), ("flux", 0)])
def test_control_types(remote, call, nets, survives, name, modes):
    net = applied(nets[name], hint_for(nets[name], call[0]), mode=5)
    with pytest.raises(InvalidInput, match=rf"has {modes} control types, and type 5 is asked for"):
        remote.denoise(*call, nets=(net,))


def test_a_picture_larger_than_the_positions(tiny_models, nets, tmp_path):
    config = {**controlnets.SD3, "pos_embed_max_size": 8}
    save_file(controlnets.tensors(made(NETS["sd3"][1], config, 1)), tmp_path / "small.safetensors")
    model, x = tiny_models["sd3"], random(1, 16, 6, 20, seed=1)
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    given = tiny.conditions(model.family, model.config, 5)
    net = replace(applied(nets["sd3"], x), net=ControlNet.of(tmp_path / "small.safetensors"))
    with pytest.raises(
        InvalidInput, match=r"picture is 160 x 48 pixels, and small.safetensors has positions for 128 x 128"
    ):
        remote.denoise(x, torch.ones(1), given, nets=(net,))


def test_pipefusion(tiny_models, nets):
    model = tiny_models["flux"]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), ParallelConfig(pipefusion_degree=2))
    asked = run_request(model)
    asked = replace(asked, positive_nets=(applied(nets["flux"], asked.latent),))
    with pytest.raises(
        InvalidInput, match=r"under PipeFusion \(pipefusion_degree 2\).*set pipefusion_degree to 1"
    ):
        remote.sample(asked)


# ---------------------------------------------------------------------- at the node that applies it

PICTURE = torch.rand(1, 48, 80, 3, generator=torch.Generator().manual_seed(1))
APPLIED = {
    "no picture": ({"image": torch.zeros(0, 8, 8, 3)}, r"hint picture is \(0, 8, 8, 3\).*each at least 1"),
    "a mask": ({"image": torch.zeros(1, 8, 8)}, r"hint picture is \(1, 8, 8\); a ControlNet takes"),
    "grey": ({"image": torch.zeros(1, 8, 8, 1)}, r"hint picture is \(1, 8, 8, 1\)"),
    "a word": ({"image": "edges.png"}, r"hint picture is str"),
    "NaN": ({"image": torch.full((1, 8, 8, 3), math.nan)}, r"not finite \(NaN or infinity\); check the node"),
    "strength": ({"strength": math.nan}, r"strength is nan; set it to a number of at most 100"),
    "start behind end": ({"start": 0.7, "end": 0.3}, r"start is 0.7 and end is 0.3; set both within 0..1"),
    "beyond the end": ({"end": 1.5}, r"start is 0.0 and end is 1.5"),
    "no VAE": ({"vae": None}, r"flux.safetensors takes its hint as the latents of a VAE, and no VAE is conn"),
    "type": (
        {"control_type": "canny (0)"},
        r"flux.safetensors has no control types.*set control_type to none",
    ),
    "unknown type": ({"control_type": "smile"}, r"control_type 'smile' is not one of none, canny"),
    "no ControlNet": ({"control_net": "x"}, r"str is no CONTROL_NET; connect 'xDiT ControlNet Loader'"),
}


@pytest.mark.parametrize("what", APPLIED)
def test_applying(nets, what):
    change, words = APPLIED[what]
    given = {
        "conditioning": [[torch.zeros(1, 4, 64), {}]], "image": PICTURE, "strength": 1.0, "start": 0.0,
        "end": 1.0, "vae": "any", "control_net": open_controlnet(str(nets["flux"].file), HEADLESS),
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=words):
        apply_controlnet(**{**given, **change}, here=HEADLESS)


def test_a_control_type_beyond_the_last(nets):
    net = open_controlnet(str(nets["flux union"].file), HEADLESS)
    with pytest.raises(
        InvalidInput, match=r"has the control types 0 to 2, and 4 is chosen; choose one of them"
    ):
        apply_controlnet([], net, PICTURE, 1.0, 0.0, 1.0, HEADLESS, "pose (4)", "any")
