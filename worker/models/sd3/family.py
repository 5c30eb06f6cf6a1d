"""Stable Diffusion 3 and 3.5 (MMDiT): diffusers' SD3Transformer2DModel.

Names in the file: Stability's (`joint_blocks...`, as ComfyUI loads them) or diffusers'.
Source of the mapping: stabilityai/sd3-ref mmdit.py and diffusers' transformer_sd3.py.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from worker.checkpoints import Shapes, Source
from worker.models.base import (
    Call,
    ModelFamily,
    depth,
    rows,
    swapped,
    whole,
)
from worker.models.plans import diffusers as plans
from worker.models.sd3.ip_adapter import SD3IPAdapter

HEAD_DIM = 64  # of every published SD3; read from the tensors where there is a q/k norm


class SD3(ModelFamily):
    name = "sd3"
    native = "joint_blocks.0.context_block.attn.qkv.weight"
    configurations = frozenset({"SD3"})
    plan = plans.SD3
    text_tokens = 333
    control: ClassVar = {"output": "transformer_blocks"}
    ip_adapter = SD3IPAdapter
    conditions = frozenset({"context", "y"})

    def detect(self, shapes: Shapes) -> bool:
        return self.native in shapes or (
            "transformer_blocks.0.attn.add_q_proj.weight" in shapes and "pos_embed.proj.weight" in shapes
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        names = _NATIVE if self.native in shapes else _DIFFUSERS
        hidden, channels, patch, _ = shapes[names["patch"]]
        norm = shapes.get(names["norm"])
        head_dim = norm[0] if norm else HEAD_DIM
        layers = depth(shapes, names["blocks"])
        return {
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "num_layers": layers,
            "attention_head_dim": head_dim,
            "num_attention_heads": hidden // head_dim,
            "joint_attention_dim": shapes[names["context"]][1],
            "caption_projection_dim": hidden,
            "pooled_projection_dim": shapes[names["pooled"]][1],
            "out_channels": shapes[names["out"]][0] // patch**2,
            "pos_embed_max_size": math.isqrt(shapes[names["position"]][1]),
            "dual_attention_layers": tuple(
                i for i in range(layers) if f"{names['blocks']}{i}.{names['dual']}" in shapes
            ),
            "qk_norm": "rms_norm" if norm else None,
        }

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(**config)

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        mapping = {"pos_embed.pos_embed": Source("pos_embed")}
        for target, source in _OUTSIDE_BLOCKS.items():
            mapping |= whole(target, source)
        mapping |= swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
        for i in range(config["num_layers"]):
            mapping |= _block(i, config)
        return mapping

    def sampling(self, config: dict[str, Any]) -> Sampling:
        return Sampling("flow", shift=3.0, multiplier=1000.0)

    def latent(self, config: dict[str, Any]) -> LatentSpace:
        patch = (config["patch_size"],) * 2
        return LatentSpace(config["in_channels"], patch=patch, scale=1.5305, mean=(0.0609,))

    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        return PromptPart("context"), PromptPart("y", "pooled_output")

    def dual(self, config: dict[str, Any]) -> int:
        return len(config["dual_attention_layers"])

    def call(
        self, config: dict[str, Any], x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> Call:
        context = self.tensor(conditions, "context", config["joint_attention_dim"])
        pooled = self.tensor(conditions, "y", config["pooled_projection_dim"])
        patch, most = config["patch_size"], config["pos_embed_max_size"]
        if max(x.shape[-2:]) > most * patch:
            pixels = self.latent(config).compression
            width, height, side = (pixels * n for n in (x.shape[-1], x.shape[-2], most * patch))
            raise InvalidInput(
                f"the picture is {width} x {height} pixels, and this {self.name} has positions for {side} x "
                f"{side}; draw a smaller picture."
            )
        kwargs = {
            "hidden_states": x,
            "encoder_hidden_states": context.to(x.dtype),
            "pooled_projections": pooled.to(x.dtype),
            "timestep": timestep,
        }
        return Call(kwargs, (x.shape[-2] // patch) * (x.shape[-1] // patch))

    def output(self, config: dict[str, Any], sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return sample


_NATIVE = {
    "patch": "x_embedder.proj.weight",
    "norm": "joint_blocks.0.x_block.attn.ln_q.weight",
    "blocks": "joint_blocks.",
    "context": "context_embedder.weight",
    "pooled": "y_embedder.mlp.0.weight",
    "out": "final_layer.linear.weight",
    "position": "pos_embed",
    "dual": "x_block.attn2.qkv.weight",
}
_DIFFUSERS = {
    "patch": "pos_embed.proj.weight",
    "norm": "transformer_blocks.0.attn.norm_q.weight",
    "blocks": "transformer_blocks.",
    "context": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "out": "proj_out.weight",
    "position": "pos_embed.pos_embed",
    "dual": "attn2.to_q.weight",
}
_OUTSIDE_BLOCKS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}


def _block(i: int, config: dict[str, Any]) -> dict[str, Source]:
    ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
    hidden = (config["caption_projection_dim"],) * 3
    image, text = f"{theirs}.x_block", f"{theirs}.context_block"
    mapping = rows(tuple(f"{ours}.attn.{n}" for n in ("to_q", "to_k", "to_v")), f"{image}.attn.qkv", hidden)
    mapping |= rows(
        tuple(f"{ours}.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")),
        f"{text}.attn.qkv",
        hidden,
    )
    mapping |= whole(f"{ours}.attn.to_out.0", f"{image}.attn.proj")
    mapping |= whole(f"{ours}.norm1.linear", f"{image}.adaLN_modulation.1")
    mapping |= whole(f"{ours}.ff.net.0.proj", f"{image}.mlp.fc1") | whole(
        f"{ours}.ff.net.2", f"{image}.mlp.fc2"
    )
    if i == config["num_layers"] - 1:  # the last block only reads the text
        mapping |= swapped(f"{ours}.norm1_context.linear", f"{text}.adaLN_modulation.1")
    else:
        mapping |= whole(f"{ours}.norm1_context.linear", f"{text}.adaLN_modulation.1")
        mapping |= whole(f"{ours}.attn.to_add_out", f"{text}.attn.proj")
        mapping |= whole(f"{ours}.ff_context.net.0.proj", f"{text}.mlp.fc1")
        mapping |= whole(f"{ours}.ff_context.net.2", f"{text}.mlp.fc2")
    norms = {}
    if config["qk_norm"]:
        norms |= {"attn.norm_q": f"{image}.attn.ln_q", "attn.norm_k": f"{image}.attn.ln_k"}
        norms |= {"attn.norm_added_q": f"{text}.attn.ln_q", "attn.norm_added_k": f"{text}.attn.ln_k"}
    if i in config["dual_attention_layers"]:
        mapping |= rows(
            tuple(f"{ours}.attn2.{n}" for n in ("to_q", "to_k", "to_v")), f"{image}.attn2.qkv", hidden
        )
        mapping |= whole(f"{ours}.attn2.to_out.0", f"{image}.attn2.proj")
        if config["qk_norm"]:
            norms |= {"attn2.norm_q": f"{image}.attn2.ln_q", "attn2.norm_k": f"{image}.attn2.ln_k"}
    return mapping | {f"{ours}.{to}.weight": Source(f"{source}.weight") for to, source in norms.items()}
