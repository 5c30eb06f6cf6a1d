"""Files that ComfyUI's detection takes for a model, and that are none: a sentence, soon."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import layout
from tests.comfyui.tiny_classes import write

Tensors = dict[str, torch.Tensor]


def one(name: str, shape: tuple[int, ...] = (8, 8)) -> Callable[[Tensors], Tensors]:
    return lambda _: {name: torch.zeros(shape)}


def without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda wan: {name: t for name, t in wan.items() if not name.startswith(start)}


def reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda wan: wan | {name: torch.zeros(shape)}


# Each from a tiny Wan, or of the one tensor that a class is known by.
BAD: dict[str, Callable[[Tensors], Tensors]] = {
    "flux by one name": one("double_blocks.0.img_attn.norm.key_norm.scale", shape=(8,)),
    "flux by one name, later": one("double_blocks.0.img_attn.norm.key_norm.weight", shape=(8,)),
    "sd3 by one name": one("joint_blocks.0.context_block.attn.qkv.weight"),
    "wan by one name": one("head.modulation", shape=(1, 2, 48)),
    "qwen image by one name": one("txt_norm.weight", shape=(8,)),
    "lumina by one name": one("cap_embedder.1.weight"),
    "hunyuan video by one name": one("txt_in.individual_token_refiner.blocks.0.norm1.weight", shape=(8,)),
    "hunyuan dit by one name": one("mlp_t5.0.weight"),
    "pixart by one name": one("t_block.1.weight"),
    "mochi by one name": one("t5_yproj.weight"),
    "ltxv by one name": one("adaln_single.emb.timestep_embedder.linear_1.bias", shape=(8,)),
    "cosmos by one name": one("x_embedder.proj.1.weight"),
    "a number for a matrix": one("double_blocks.0.img_attn.norm.key_norm.scale", shape=()),
    "nothing for a matrix": one("head.modulation", shape=(0,)),
    "no blocks": without("blocks."),
    "a hole between blocks": without("blocks.0."),
    "no head": without("head."),
    "a block without attention": without("blocks.1.self_attn"),
    "a head of another width": reshaped("head.modulation", 1, 2, 64),
    "a head of one dimension": reshaped("head.modulation", 96),
    "a first layer of two dimensions": reshaped("patch_embedding.weight", 48, 64),
    "a layer of another width": reshaped("blocks.0.ffn.0.weight", 96, 40),
    "a bias of two dimensions": reshaped("blocks.0.ffn.0.bias", 96, 1),
    "names of two models": lambda wan: wan | one("joint_blocks.0.context_block.attn.qkv.weight")(wan),
    "a prefix before half of it": lambda wan: {
        f"model.diffusion_model.{n}" if i % 2 else n: t for i, (n, t) in enumerate(wan.items())
    },
    "all of one tensor's bytes": lambda wan: {"weight": torch.zeros(10)},
    "no tensor": lambda wan: {},
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_soon_and_leaves_what_is_loaded(comfyui, run_node, kind):
    folder = comfyui.models / "diffusion_models"
    good = write("wan t2v", folder)
    tensors = load_file(folder / good)
    size = next(name for name in tensors if "tiny_size" in name)
    with torch.inference_mode(False):
        made = {name: tensor.clone() for name, tensor in BAD[kind](tensors).items()}
        if any(name == "head.modulation" for name in made) and len(made) > 1:
            made[size] = tensors[size].clone()
        save_file(made, folder / "bad.safetensors")

    def load(name: str) -> None:
        run_node("XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout())

    load(good)
    began = time.perf_counter()
    with pytest.raises(InvalidInput) as caught:
        load("bad.safetensors")
    assert time.perf_counter() - began < 2
    assert "bad.safetensors" in str(caught.value) and ";" in str(caught.value)
    began = time.perf_counter()
    load(good)
    assert time.perf_counter() - began < 2, "it is loaded still"


def test_a_spread_weight_of_another_shape_is_refused(comfyui, run_node):
    """Of which each rank reads its part alone."""
    folder = comfyui.models / "diffusion_models"
    with torch.inference_mode(False):
        tensors = load_file(folder / write("wan t2v", folder))
        save_file(tensors | {"blocks.0.ffn.0.weight": torch.zeros(96, 40)}, folder / "bad_part.safetensors")

    with pytest.raises(InvalidInput, match=r"blocks\.0\.ffn\.0\.weight has shape \(96, 40\), not \(96, 48\)"):
        run_node(
            "XDiTLoadDiffusionModel", unet_name="bad_part.safetensors", weight_dtype="default",
            parallel=layout(data_parallel_degree=2, shard_weights=True),
        )  # fmt: skip
