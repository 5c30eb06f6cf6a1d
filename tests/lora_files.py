"""LoRA files in every naming, written from tables by hand, and what they do to plain diffusers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

RANK, ALPHA = 4, 2.0
Tensors = dict[str, torch.Tensor]
# Original release's module: diffusers' modules, one after the other in its rows.
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd3": {
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "joint_blocks.0.x_block.attn.qkv": tuple(f"transformer_blocks.0.attn.to_{n}" for n in "qkv"),
        "joint_blocks.0.context_block.attn.qkv": tuple(
            f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"
        ),
        "joint_blocks.0.x_block.attn.proj": ("transformer_blocks.0.attn.to_out.0",),
        "joint_blocks.1.x_block.mlp.fc1": ("transformer_blocks.1.ff.net.0.proj",),
        "joint_blocks.1.context_block.mlp.fc2": ("transformer_blocks.1.ff_context.net.2",),
        "joint_blocks.1.x_block.adaLN_modulation.1": ("transformer_blocks.1.norm1.linear",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    "flux": {
        "img_in": ("x_embedder",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.to_{n}" for n in "qkv"),
        "double_blocks.0.txt_attn.qkv": tuple(f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"),
        "double_blocks.1.img_attn.proj": ("transformer_blocks.1.attn.to_out.0",),
        "double_blocks.1.txt_mlp.0": ("transformer_blocks.1.ff_context.net.0.proj",),
        "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
        "single_blocks.0.linear1": (
            *(f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ),
        "single_blocks.1.linear2": ("single_transformer_blocks.1.proj_out",),
        "single_blocks.2.modulation.lin": ("single_transformer_blocks.2.norm.linear",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
}
SWAPPED = "final_layer.adaLN_modulation.1"  # the release stores (shift, scale), diffusers (scale, shift)
XLABS = {
    "double_blocks.0.processor.qkv_lora1": tuple(f"transformer_blocks.0.attn.to_{n}" for n in "qkv"),
    "double_blocks.0.processor.qkv_lora2": tuple(f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"),
    "double_blocks.1.processor.proj_lora1": ("transformer_blocks.1.attn.to_out.0",),
    "double_blocks.1.processor.proj_lora2": ("transformer_blocks.1.attn.to_add_out",),
    "single_blocks.0.processor.qkv_lora": tuple(f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"),
    "single_blocks.1.processor.proj_lora": ("single_transformer_blocks.1.proj_out",),
}


@dataclass(frozen=True)
class Naming:
    """How a trainer writes a module's name and its parts; `native` is whose modules it names."""

    native: bool
    pattern: str
    up: str = "lora_up.weight"
    down: str = "lora_down.weight"
    alpha: bool = True
    flat: bool = False

    def at(self, module: str) -> str:
        """The name of a module in the file."""
        return self.pattern.format(module.replace(".", "_") if self.flat else module)


PEFT = {"up": "lora_B.weight", "down": "lora_A.weight", "alpha": False}
NAMINGS = {
    "kohya": Naming(True, "lora_unet_{}", flat=True),
    "comfyui": Naming(True, "diffusion_model.{}"),
    "comfyui with peft parts": Naming(True, "diffusion_model.{}", **PEFT),
    "bfl": Naming(True, "{}", **PEFT),
    "bfl in peft": Naming(True, "base_model.model.{}", **PEFT),
    "diffusers": Naming(False, "transformer.{}", **PEFT),
    "diffusers with alpha": Naming(False, "transformer.{}"),
    "diffusers of old": Naming(False, "unet.{}", up="lora.up.weight", down="lora.down.weight", alpha=False),
    "peft": Naming(False, "base_model.model.{}", **PEFT),
    "peft adapter": Naming(
        False, "base_model.model.{}", up="lora_B.default.weight", down="lora_A.default.weight", alpha=False
    ),
    "onetrainer": Naming(False, "lora_transformer_{}", flat=True),
    "simpletuner": Naming(False, "lycoris_{}", flat=True),
}


def rows(module: torch.nn.Module, names: tuple[str, ...]) -> list[int]:
    """How many rows each of these layers has."""
    return [module.get_submodule(name).weight.shape[0] for name in names]


def write(model: Any, naming: Naming, seed: int) -> tuple[Tensors, Tensors]:
    """A file in a naming, and its change of diffusers' weights at strength 1, by module."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    changes: Tensors = {}
    for theirs, ours in TABLES[model.family.name].items():
        columns = model.module.get_submodule(ours[0]).weight.shape[1]
        for name, parts in ((theirs, ours),) if naming.native else tuple((o, (o,)) for o in ours):
            sizes = rows(model.module, parts)
            up, down = pair(random, sum(sizes), columns)
            tensors |= named(naming, name, up, down)
            delta = (ALPHA / RANK if naming.alpha else 1.0) * (up @ down)
            if name == SWAPPED:
                delta = torch.cat(delta.chunk(2)[::-1])
            changes |= dict(zip(parts, delta.split(sizes), strict=True))
    return tensors, changes


def named(naming: Naming, name: str, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """Both halves and the alpha as the naming has them."""
    at = naming.at(name)
    alpha = {f"{at}.alpha": torch.tensor(ALPHA)} if naming.alpha else {}
    return {f"{at}.{naming.up}": up, f"{at}.{naming.down}": down, **alpha}


def xlabs(model: Any, seed: int) -> tuple[Tensors, Tensors]:
    """As `write`, in XLabs' naming of a Flux."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    changes: Tensors = {}
    for name, ours in XLABS.items():
        sizes = rows(model.module, ours)
        up, down = pair(random, sum(sizes), model.module.get_submodule(ours[0]).weight.shape[1])
        tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        changes |= dict(zip(ours, (up @ down).split(sizes), strict=True))
    return tensors, changes


def pair(random: torch.Generator, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of a LoRA that changes a weight visibly."""
    down = torch.randn(RANK, width, generator=random) / 4 / width**0.5
    return torch.randn(height, RANK, generator=random), down


def merged(model: Any, *changes: tuple[Tensors, float]) -> torch.nn.Module:
    """Plain diffusers with the changes added by hand, each at its strength."""
    module = copy.deepcopy(model.module)
    for change, strength in changes:
        for name, delta in change.items():
            module.get_submodule(name).weight.data += strength * delta
    return module
