"""VAE files: the original releases' naming, and files and latents that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.vae import RemoteVAE
from tests import vaes
from tests.tiny import relative_l2


def load(path: Path) -> RemoteVAE:
    vae = RemoteVAE(ModelSpec.of(path, "vae"), ParallelConfig(ulysses_degree=2))
    vae.load()
    return vae


def write(tensors: dict[str, torch.Tensor], file: Path, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def check(vae: RemoteVAE, module: nn.Module) -> None:
    """It decodes and encodes as `module`."""
    shape = (1, vae.info["latent_channels"], 5, 4)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latent = latent if vae.info["temporal_compression"] is None else latent.unsqueeze(2)
    with torch.no_grad():
        sample = module.decode(latent, return_dict=False)[0]
        expected = (sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        mean = module.encode(expected.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert relative_l2(vae.decode(latent), expected) <= 1e-5
    assert relative_l2(vae.encode(expected), mean) <= 1e-5


@pytest.mark.parametrize("quantised", [False, True], ids=["SD3", "SD1.5"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_latent_diffusion_naming(tmp_path: Path, prefix: str, quantised: bool):
    config = vaes.CONFIGS["AutoencoderKL"] | {"use_quant_conv": quantised, "use_post_quant_conv": quantised}
    module = vaes.build("AutoencoderKL", config)
    original = vaes.ldm_names(module)
    # The naming is right if diffusers' own conversion gives the module again.
    converted = convert_ldm_vae_checkpoint(dict(original), module.config)
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in module.state_dict().items()}
    others = {} if not prefix else {"model.diffusion_model.joint_blocks.0.x": torch.zeros(2)}
    file = write({prefix + n: t for n, t in original.items()} | others, tmp_path / "vae.safetensors")

    vae = load(file)

    assert vae.info["family"] == "AutoencoderKL"
    check(vae, module)


def test_single_file_in_diffusers_naming(tmp_path: Path):
    module = vaes.build("AutoencoderKL")
    check(load(write(module.state_dict(), tmp_path / "vae.safetensors")), module)


def test_old_attention_names_in_a_diffusers_folder(tmp_path: Path):
    module = vaes.build("AutoencoderKL")
    module.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = module.state_dict()
    for new, name in old.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    file = write(tensors, tmp_path / "diffusion_pytorch_model.safetensors")

    check(load(tmp_path), module)
    check(load(file), module)  # beside its config.json


def test_wan_naming(tmp_path: Path):
    module = vaes.build("AutoencoderKLWan", vaes.WAN_2_1)
    original = vaes.wan_names(module)
    assert convert_wan_vae_to_diffusers(dict(original)).keys() == module.state_dict().keys()

    vae = load(write(original, tmp_path / "wan.safetensors"))

    assert vae.info["family"] == "AutoencoderKLWan"
    check(vae, module)


def test_half_precision_is_computed_in_fp32_on_cpu(tmp_path: Path):
    module = vaes.build("AutoencoderKL")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in vaes.ldm_names(module).items()}
    vae = load(write(half, tmp_path / "vae.safetensors"))

    assert vae.info["dtype"] == "float32"
    check(vae, module.to(torch.bfloat16).float())


# ---------------------------------------------------------------------- wrong ones


def _without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if k != name}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[RemoteVAE, nn.Module, dict[str, torch.Tensor]]:
    module = vaes.build("AutoencoderKL")
    tensors = vaes.ldm_names(module)
    return load(write(tensors, tmp_path_factory.mktemp("good") / "vae.safetensors")), module, tensors


def _damaged(file: Path, tensors: Any) -> None:
    write(tensors, file)
    file.write_bytes(file.read_bytes()[:3000])


def _folder(cls: str, **changes: Any) -> Any:
    def make(file: Path, tensors: Any) -> Path:
        module = vaes.build("AutoencoderKL")
        module.save_pretrained(file.parent / cls)
        config = json.loads((file.parent / cls / "config.json").read_text())
        (file.parent / cls / "config.json").write_text(json.dumps(config | {"_class_name": cls} | changes))
        return file.parent / cls

    return make


WRONG = {
    "empty": (lambda file, _: file.write_bytes(b""), r"\(0 bytes\) is damaged"),
    "damaged": (_damaged, r"\(3000 bytes\) is damaged"),
    "no safetensors": (lambda file, _: file.write_text("<html>"), r"is damaged or not a safetensors file"),
    "no tensors": (lambda file, _: write({}, file), r"holds no VAE .* its 0 tensors begin with none"),
    "a transformer": (
        lambda file, _: write({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3, 1)}, file),
        r"holds no VAE that the ranks know: its 1 tensors begin with joint_blocks",
    ),
    "TAESD": (
        lambda file, _: write({"taesd_decoder.1.weight": torch.zeros(3, 16, 3, 3)}, file),
        r"is TAESD, a small approximation that needs no ranks.* use the stock VAE loader",
    ),
    "Mochi": (
        lambda file, _: write({"decoder.blocks.2.blocks.3.stack.5.weight": torch.zeros(1)}, file),
        r"is a Mochi VAE in Genmo's naming.* diffusers' folder",
    ),
    "a tensor missing": (
        lambda file, tensors: write(_without(tensors, "decoder.mid.attn_1.k.bias"), file),
        r"lacks 1 of the \d+ tensors of AutoencoderKL, decoder\.mid_block\.attentions\.0\.to_k\.bias first",
    ),
    "no encoder": (
        lambda file, tensors: write({k: v for k, v in tensors.items() if not k.startswith("encoder")}, file),
        r"lacks \d+ of the \d+ tensors",
    ),
    "wrong shape": (
        lambda file, tensors: write(tensors | {"decoder.mid.attn_1.k.bias": torch.zeros(7)}, file),
        r"to_k\.bias in .* has shape \(7,\), AutoencoderKL has \(64,\)",
    ),
    "another class": (_folder("VQModel"), r"holds a VQModel; the ranks run AutoencoderKL, "),
    "wrong configuration": (
        _folder("AutoencoderKL", down_block_types=["Nonsense"]),
        r"configuration of the AutoencoderKL .* is wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_named_and_costs_nothing(tmp_path: Path, good: Any, wrong: str):
    vae, module, tensors = good
    make, words = WRONG[wrong]
    pids = list(worker_group(vae.parallel).pids)
    made = make(tmp_path / "wrong.safetensors", tensors)

    with pytest.raises(InvalidInput, match=words):
        load(made if wrong in ("another class", "wrong configuration") else tmp_path / "wrong.safetensors")

    assert worker_group(vae.parallel).pids == pids
    check(vae, module)


def test_a_pickle_is_refused(tmp_path: Path, good: Any):
    vae, module, tensors = good
    torch.save(tensors, tmp_path / "vae.pt")
    with pytest.raises(InvalidInput, match=r"vae\.pt is a pickle file, which can run code; convert it"):
        load(tmp_path / "vae.pt")
    check(vae, module)


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        (torch.zeros(1, 4, 8, 8), r"shape \(1, 4, 8, 8\), this VAE decodes \(batch, 16, height, width\)"),
        (torch.zeros(1, 16, 2, 8, 8), r"shape \(1, 16, 2, 8, 8\), this VAE decodes"),
        (torch.full((1, 16, 4, 4), float("nan")), "not finite"),
        (torch.zeros(0, 16, 4, 4), "is empty"),
        (torch.zeros(1, 16, 0, 4), "is empty"),
    ],
)
def test_a_wrong_latent_is_named(good: Any, latent: torch.Tensor, words: str):
    vae, module, _ = good
    with pytest.raises(InvalidInput, match=words):
        vae.decode(latent)
    check(vae, module)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.full((1, 16, 16, 3), float("inf")), "not finite"),
        (torch.zeros(1, 3, 16, 3), "16 x 3 pixels is smaller than one place of a latent, 4 x 4"),
        (torch.zeros(1, 16, 16, 1), r"the VAE encodes \(batch, 3, height, width\)"),
    ],
)
def test_wrong_pictures_are_named(good: Any, pixels: torch.Tensor, words: str):
    vae, module, _ = good
    with pytest.raises(InvalidInput, match=words):
        vae.encode(pixels)
    check(vae, module)
