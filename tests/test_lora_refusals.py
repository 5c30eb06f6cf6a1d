"""LoRA files that cannot be applied: each is an error of the node, and costs nothing that runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.lora import add_lora
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.lora_files import NAMINGS, write

TWO = ParallelConfig(ulysses_degree=2)
AT = "lora_unet_joint_blocks_0_x_block_attn_qkv"
UP, DOWN = f"{AT}.lora_up.weight", f"{AT}.lora_down.weight"
PLAIN = {UP: torch.ones(768, 4), DOWN: torch.ones(4, 256)}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in PLAIN.items() if key != name}


def changed(name: str, value: float) -> dict[str, torch.Tensor]:
    tensor = PLAIN[name].clone()
    tensor[0, 0] = value
    return PLAIN | {name: tensor}


def at(ending: str, *shape: int) -> dict[str, torch.Tensor]:
    return {f"{AT}.{ending}": torch.ones(shape)}


# What is in the file, and what the error says.
TENSORS = {
    "unknown names": (
        {"a.b": torch.ones(1)},
        r"none of the 1 tensors of bad\.safetensors match this sd3.*\(they begin with a\.b\); choose a LoRA "
        r"made for sd3\. Names that are read: kohya \(lora_unet_",
    ),
    "text encoders": ({"lora_te1_x.lora_up.weight": torch.ones(1)}, "all 1 tensors .* for text encoders"),
    "other width": ({UP: torch.ones(96, 4), DOWN: torch.ones(4, 32)}, r"does not fit joint.*choose a"),
    "up too short": ({UP: torch.ones(256, 4), DOWN: torch.ones(4, 256)}, r"does not fit.*\(256, 256\)"),
    "rank mismatch": ({UP: torch.ones(768, 4), DOWN: torch.ones(8, 256)}, r"halves have rank 4 and 8"),
    "NaN": (changed(UP, torch.nan), r"lora_up\.weight holds values that are not finite"),
    "infinity": (changed(DOWN, torch.inf), r"lora_down\.weight holds values that are not finite"),
    "half missing": (without(DOWN), r"it has up alone, which is not all of it"),
    "no tensors": ({}, r"bad\.safetensors holds no tensors"),
    "empty tensors": ({UP: torch.ones(768, 0), DOWN: torch.ones(0, 256)}, r"is empty, its shape is \(0,"),
    "integers": ({name: t.to(torch.int8) for name, t in PLAIN.items()}, "I8 numbers, not floating point"),
    "vectors": ({UP: torch.ones(768), DOWN: torch.ones(256)}, r"has shape \(256,\), which is no matrix"),
    "two alphas": (PLAIN | at("alpha", 2), r"its alpha has shape \(2,\), not one number"),
    "alpha NaN": (PLAIN | {f"{AT}.alpha": torch.tensor(torch.nan)}, "its alpha is nan"),
    "alpha alone": (at("alpha", 1), "none of the 1 tensors"),
    "PEFT's DoRA": (PLAIN | at("lora_magnitude_vector", 768), r"PEFT's DoRA .* convert it"),
    "enlarges": (PLAIN | at("reshape_weight", 2), r"it enlarges the weight"),
    "diff of another shape": (at("diff", 7, 5), r"diff patch does not fit joint_blocks.*\(7, 5\)"),
    "set of another shape": (at("set_weight", 7, 5), r"set patch does not fit joint_blocks"),
    "bias where there is none": ({"diffusion_model.pos_embed.diff_b": torch.ones(3)}, "none of the 1"),
    "OFT of two dimensions": (at("oft_blocks", 4, 4), r"its blocks have shape \(4, 4\)"),
    "OFT that does not divide": (at("oft_blocks", 5, 4, 4), r"oft patch does not fit"),
    "BOFT that does not divide": (at("oft_blocks", 2, 5, 6, 6), r"boft patch does not fit"),
    "LoKr half": (at("lokr_w1", 2, 2), r"it has w1 alone"),
    "LoKr of another size": (at("lokr_w1", 2, 2) | at("lokr_w2", 5, 5), r"lokr patch does not fit"),
    "LoHa of another size": (
        {k: v for part in ("w1_a", "w2_a") for k, v in at(f"hada_{part}", 768, 4).items()}
        | {k: v for part in ("w1_b", "w2_b") for k, v in at(f"hada_{part}", 4, 99).items()},
        r"loha patch does not fit",
    ),
    "DoRA of another size": (PLAIN | at("dora_scale", 11, 1), r"lora patch does not fit"),
    "GLoRA of another size": (
        {k: v for part in ("a1", "a2", "b1", "b2") for k, v in at(f"{part}.weight", 5, 4).items()},
        r"glora patch does not fit",
    ),
}  # fmt: skip
BYTES = {
    "no bytes.safetensors": (b"", r"\(0 bytes\) is damaged"),
    "text.safetensors": (b"<html>404</html>", r"is damaged or not a safetensors file.*download it again"),
    "pickle.pt": (b"\x80\x04", r"pickle file, which can run code; convert it on a machine you trust"),
    "pickle.bin": (b"\x80\x04", r"pickle file, which can run code"),
    "pickle in disguise.safetensors": (b"\x80\x04.", r"is damaged or not a safetensors file"),
}


@pytest.fixture(scope="module")
def remote(tiny_models):
    remote = RemoteModel(ModelSpec.of(tiny_models["sd3"].file, "transformer"), TWO)
    remote.load()
    return remote


@pytest.fixture
def survives(remote, tiny_models):
    """The same processes draw the same, to the bit, before and after."""
    model = tiny_models["sd3"]
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (x, torch.full((1,), 700.0), tiny.conditions(model.family, model.config, 5))
    before, pids = remote.denoise(*inputs), list(worker_group(TWO).pids)
    yield
    assert torch.equal(remote.denoise(*inputs), before)
    assert worker_group(TWO).pids == pids


def refuse(remote: RemoteModel, path, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        add_lora(remote, str(path), 1.0, HEADLESS)


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(remote, survives, tmp_path, what):
    tensors, words = TENSORS[what]
    save_file(tensors, tmp_path / "bad.safetensors")
    refuse(remote, tmp_path / "bad.safetensors", words)


@pytest.mark.parametrize("name", BYTES)
def test_files_that_are_no_safetensors(remote, survives, tmp_path, name):
    content, words = BYTES[name]
    (tmp_path / name).write_bytes(content)
    refuse(remote, tmp_path / name, words)


def test_truncated(remote, survives, tmp_path, tiny_models):
    tensors, _ = write(tiny_models["sd3"], NAMINGS["kohya"], 1)
    save_file(tensors, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:9000])
    refuse(remote, tmp_path / "half.safetensors", r"half\.safetensors \(9000 bytes\) is damaged")


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_other_family(remote, survives, tmp_path, tiny_models, naming):
    tensors, _ = write(tiny_models["flux"], NAMINGS[naming], 1)
    save_file(tensors, tmp_path / "flux.safetensors")
    refuse(remote, tmp_path / "flux.safetensors", r"flux\.safetensors.*choose a (LoRA|complete)")


def test_missing_and_folder(remote, survives, tmp_path):
    refuse(remote, tmp_path / "gone.safetensors", "no LoRA .*gone.safetensors")
    refuse(remote, tmp_path, "no LoRA")


def test_what_is_no_model():
    with pytest.raises(InvalidInput, match="str is neither a MODEL"):
        add_lora("model", "x", 1.0, HEADLESS)
