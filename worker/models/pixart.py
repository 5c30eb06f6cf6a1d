"""PixArt-Sigma: diffusers' PixArtTransformer2DModel without conditions of size.

Names in the file: the original release's (`blocks...`, as ComfyUI loads them) or diffusers'.
Source of the mapping: PixArt-alpha/PixArt-sigma tools/convert_pixart_to_diffusers.py and diffusers'
pixart_transformer_2d.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.sampling import Sampling
from worker.checkpoints import Shapes, Source
from worker.models.base import Call, ModelFamily, depth, rows, whole
from worker.models.plans import diffusers as plans

HEAD_DIM = 72  # of every published one
SCALE = 0.13025  # of the latents: SDXL's VAE


class PixArtSigma(ModelFamily):
    name = "pixart-sigma"
    native = "t_block.1.weight"
    configurations: frozenset[str] = frozenset()  # in ComfyUI its own class runs
    plan = plans.PIXART
    text_tokens = 300
    products = 16.0  # with an attention to the prompt
    control: ClassVar = {}
    conditions = frozenset({"context"})

    def detect(self, shapes: Shapes) -> bool:
        # PixArt-Alpha has embedders of the picture's size and shape.
        if "ar_embedder.mlp.0.weight" in shapes:
            return False
        return self.native in shapes or (
            "caption_projection.linear_1.weight" in shapes
            and "adaln_single.linear.weight" in shapes
            and "adaln_single.emb.resolution_embedder.linear_1.weight" not in shapes
            and "pos_embed.proj.weight" in shapes  # SANA's is another
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        native = self.native in shapes
        hidden, channels, patch, _ = shapes["x_embedder.proj.weight" if native else "pos_embed.proj.weight"]
        caption = "y_embedder.y_proj.fc1.weight" if native else "caption_projection.linear_1.weight"
        out = "final_layer.linear.weight" if native else "proj_out.weight"
        return {
            # The last two are in no tensor: those of 1024 x 1024 pixels, where no folder says otherwise.
            "num_attention_heads": hidden // HEAD_DIM,
            "attention_head_dim": HEAD_DIM,
            "in_channels": channels,
            "out_channels": shapes[out][0] // patch**2,
            "num_layers": depth(shapes, "blocks." if native else "transformer_blocks."),
            "cross_attention_dim": hidden,
            "caption_channels": shapes[caption][1],
            "patch_size": patch,
            "use_additional_conditions": False,
            "sample_size": 128,
            "interpolation_scale": 2,
        }

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(**config)

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        mapping = {"scale_shift_table": Source("final_layer.scale_shift_table")}
        for target, source in _OUTSIDE_BLOCKS.items():
            mapping |= whole(target, source)
        for i in range(config["num_layers"]):
            mapping |= _block(i, config["cross_attention_dim"])
        return mapping

    def sampling(self, config: dict[str, Any]) -> Sampling:
        return Sampling("discrete", prediction="epsilon", betas=(0.0001, 0.02), even_roots=False)

    def latent(self, config: dict[str, Any]) -> LatentSpace:
        return LatentSpace(config["in_channels"], patch=(config["patch_size"],) * 2, scale=SCALE)

    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        return (PromptPart("context"),)

    def call(
        self, config: dict[str, Any], x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> Call:
        kwargs = {
            "hidden_states": x,
            "encoder_hidden_states": self.tensor(conditions, "context", config["caption_channels"]).to(
                x.dtype
            ),
            "timestep": timestep,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        return Call(kwargs, (x.shape[-2] // config["patch_size"]) * (x.shape[-1] // config["patch_size"]))

    def output(self, config: dict[str, Any], sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return sample[:, : x.shape[1]]  # behind it a variance that no sampler here reads


_OUTSIDE_BLOCKS = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
}


def _block(i: int, hidden: int) -> dict[str, Source]:
    ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
    mapping = {f"{ours}.scale_shift_table": Source(f"{theirs}.scale_shift_table")}
    mapping |= rows(
        tuple(f"{ours}.attn1.{n}" for n in ("to_q", "to_k", "to_v")), f"{theirs}.attn.qkv", (hidden,) * 3
    )
    mapping |= rows(
        tuple(f"{ours}.attn2.{n}" for n in ("to_k", "to_v")), f"{theirs}.cross_attn.kv_linear", (hidden,) * 2
    )
    for target, source in {
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }.items():
        mapping |= whole(f"{ours}.{target}", f"{theirs}.{source}")
    return mapping
