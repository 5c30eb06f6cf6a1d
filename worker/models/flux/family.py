"""FLUX.1 dev, schnell, Kontext, Fill, Canny and Depth: diffusers' FluxTransformer2DModel.

Names in the file: Black Forest Labs' (`double_blocks...`, as ComfyUI loads them) or diffusers'.
Source of the mapping: black-forest-labs/flux model.py and diffusers' transformer_flux.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.sampling import Sampling
from worker.checkpoints import Shapes, Source
from worker.models.base import (
    PATCH,
    Call,
    ModelFamily,
    depth,
    packed,
    rows,
    swapped,
    unpacked,
    whole,
)
from worker.models.flux.hooks import ExactTime
from worker.models.flux.ip_adapter import FluxIPAdapter
from worker.models.flux.tokens import reference_tokens, token_ids
from worker.models.plans import diffusers as plans

DEFAULT_GUIDANCE = 3.5  # what ComfyUI gives it where no FluxGuidance node is in the graph
MLP_RATIO = 4  # of every FLUX.1, and the only one diffusers' class has


class Flux(ModelFamily):
    name = "flux"
    native = "double_blocks.0.img_attn.qkv.weight"
    configurations = frozenset({"Flux", "FluxSchnell"})
    plan = plans.FLUX
    text_tokens = 512
    guided = False
    control: ClassVar = {"input": "transformer_blocks", "output": "single_transformer_blocks"}
    ip_adapter = FluxIPAdapter
    conditions = frozenset({"context", "y", "guidance", "ref_latents", "ref_latents_method", "rope_options"})

    def detect(self, shapes: Shapes) -> bool:
        return self.native in shapes or (
            "single_transformer_blocks.0.proj_mlp.weight" in shapes
            and "time_text_embed.text_embedder.linear_1.weight" in shapes
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        names = _NATIVE if self.native in shapes else _DIFFUSERS
        hidden, channels = shapes[names["image"]]
        head_dim = shapes[names["norm"]][0]
        out = shapes[names["out"]][0]
        return {
            "patch_size": 1,
            "in_channels": channels,
            "out_channels": None if out == channels else out,
            "num_layers": depth(shapes, names["double"]),
            "num_single_layers": depth(shapes, names["single"]),
            "attention_head_dim": head_dim,
            "num_attention_heads": hidden // head_dim,
            "joint_attention_dim": shapes[names["context"]][1],
            "pooled_projection_dim": shapes[names["pooled"]][1],
            "guidance_embeds": names["guidance"] in shapes,
            # 16, 56, 56 of 128 in every published FLUX.1: an eighth for the index, the rest in half
            "axes_dims_rope": (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        }

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(**config)

    def prepare(self, module: nn.Module) -> None:
        ExactTime(module)

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        outside = dict(_OUTSIDE_BLOCKS)
        if config["guidance_embeds"]:
            for n, part in ((1, "in_layer"), (2, "out_layer")):
                outside[f"time_text_embed.guidance_embedder.linear_{n}"] = f"guidance_in.{part}"
        mapping: dict[str, Source] = {}
        for target, source in outside.items():
            mapping |= whole(target, source)
        mapping |= swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        for i in range(config["num_layers"]):
            mapping |= _double_block(i, hidden)
        for i in range(config["num_single_layers"]):
            mapping |= _single_block(i, hidden)
        return mapping

    def lora_names(self, config: dict[str, Any]) -> dict[str, Source]:
        fused = 3 * config["num_attention_heads"] * config["attention_head_dim"]
        names: dict[str, Source] = {}
        for i in range(config["num_layers"]):
            for n, stream in ((1, "img"), (2, "txt")):  # XLabs' attention processors
                for part in ("qkv", "proj"):
                    name = f"double_blocks.{i}.processor.{part}_lora{n}.weight"
                    names[name] = Source(f"double_blocks.{i}.{stream}_attn.{part}.weight")
        for i in range(config["num_single_layers"]):
            qkv = Source(f"single_blocks.{i}.linear1.weight", 0, fused)
            names[f"single_blocks.{i}.linear1_qkv.weight"] = qkv
            names[f"single_blocks.{i}.processor.qkv_lora.weight"] = qkv
            names[f"single_blocks.{i}.processor.proj_lora.weight"] = Source(
                f"single_blocks.{i}.linear2.weight"
            )
        return names

    def sampling(self, config: dict[str, Any]) -> Sampling:
        if config["guidance_embeds"]:
            return Sampling("exponential_flow", shift=1.15, multiplier=1.0)
        return Sampling("flow", shift=1.0, multiplier=1.0)  # schnell

    def latent(self, config: dict[str, Any]) -> LatentSpace:
        patch = (PATCH, PATCH)
        channels = (config["out_channels"] or config["in_channels"]) // PATCH**2
        return LatentSpace(channels, patch=patch, scale=0.3611, mean=(0.1159,))

    def beside(self, config: dict[str, Any]) -> int:
        # Of Fill a picture and its mask, of Canny and Depth what they go by.
        return config["in_channels"] // PATCH**2 - self.latent(config).channels

    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        parts = PromptPart("context"), PromptPart("y", "pooled_output")
        guidance = PromptPart("guidance", "guidance", DEFAULT_GUIDANCE)
        return (*parts, guidance) if config["guidance_embeds"] else parts

    def call(
        self, config: dict[str, Any], x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> Call:
        context = self.tensor(conditions, "context", config["joint_attention_dim"])
        pooled = conditions["y"][..., : config["pooled_projection_dim"]] if "y" in conditions else None
        pooled = self.tensor({"y": pooled}, "y", config["pooled_projection_dim"])
        rope = conditions.get("rope_options", {})
        references = reference_tokens(
            conditions.get("ref_latents", ()), conditions.get("ref_latents_method", "offset"), x, rope
        )
        tokens = [(packed(x), token_ids(x.shape, x.device, rope)), *references]
        image = torch.cat([part for part, _ in tokens], 1)
        kwargs = {
            "hidden_states": image,
            "encoder_hidden_states": context.to(x.dtype),
            "pooled_projections": pooled.to(x.dtype),
            "timestep": timestep,
            "img_ids": torch.cat([ids for _, ids in tokens]),
            "txt_ids": x.new_zeros(context.shape[1], 3, dtype=torch.float32),
        }
        if config["guidance_embeds"]:
            # None where a node disabled it; ComfyUI fills in its default itself.
            guidance = conditions.get("guidance")
            if guidance is not None:
                guidance = torch.as_tensor(guidance, device=x.device, dtype=torch.float32).expand(x.shape[0])
            kwargs["guidance"] = guidance
        return Call(kwargs, image.shape[1])

    def output(self, config: dict[str, Any], sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return unpacked(sample, x.shape)


_NATIVE = {
    "image": "img_in.weight",
    "norm": "double_blocks.0.img_attn.norm.query_norm.scale",
    "out": "final_layer.linear.weight",
    "double": "double_blocks.",
    "single": "single_blocks.",
    "context": "txt_in.weight",
    "pooled": "vector_in.in_layer.weight",
    "guidance": "guidance_in.in_layer.weight",
}
_DIFFUSERS = {
    "image": "x_embedder.weight",
    "norm": "transformer_blocks.0.attn.norm_q.weight",
    "out": "proj_out.weight",
    "double": "transformer_blocks.",
    "single": "single_transformer_blocks.",
    "context": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
}
_OUTSIDE_BLOCKS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}


def _double_block(i: int, hidden: int) -> dict[str, Source]:
    ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
    image = tuple(f"{ours}.attn.{n}" for n in ("to_q", "to_k", "to_v"))
    text = tuple(f"{ours}.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj"))
    mapping = rows(image, f"{theirs}.img_attn.qkv", (hidden,) * 3)
    mapping |= rows(text, f"{theirs}.txt_attn.qkv", (hidden,) * 3)
    for target, source in {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }.items():
        mapping |= whole(f"{ours}.{target}", f"{theirs}.{source}")
    for target, source in {
        "norm_q": "img_attn.norm.query_norm",
        "norm_k": "img_attn.norm.key_norm",
        "norm_added_q": "txt_attn.norm.query_norm",
        "norm_added_k": "txt_attn.norm.key_norm",
    }.items():
        mapping[f"{ours}.attn.{target}.weight"] = Source(f"{theirs}.{source}.scale")
    return mapping


def _single_block(i: int, hidden: int) -> dict[str, Source]:
    ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
    targets = tuple(f"{ours}.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    mapping = rows(targets, f"{theirs}.linear1", (hidden, hidden, hidden, MLP_RATIO * hidden))
    mapping |= whole(f"{ours}.norm.linear", f"{theirs}.modulation.lin")
    mapping |= whole(f"{ours}.proj_out", f"{theirs}.linear2")
    for ours_norm, theirs_norm in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
        mapping[f"{ours}.attn.{ours_norm}.weight"] = Source(f"{theirs}.norm.{theirs_norm}.scale")
    return mapping
