"""Tiny VAEs of every class the ranks run, with random weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import diffusers
import torch
from torch import nn

PICTURE = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
WAN = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
    "temperal_downsample": [True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip
# Wan 2.1's structure, narrow: diffusers' conversion knows no other.
WAN_2_1 = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    # SD3 and FLUX.1: 16 channels and no quantisation convolutions.
    "AutoencoderKL": {
        **PICTURE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "AutoencoderKLFlux2": {**PICTURE, "latent_channels": 8, "decoder_block_out_channels": (32, 64, 64)},
    "AutoencoderKLWan": {
        **WAN, "scale_factor_spatial": 4, "scale_factor_temporal": 4,
    },
    # As Wan 2.2: in patches, with residual stages.
    "AutoencoderKLWan 2.2": {
        **WAN, "decoder_base_dim": 16, "is_residual": True, "patch_size": 2, "in_channels": 12,
        "out_channels": 12, "scale_factor_spatial": 8,
    },
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (16, 16, 32), "layers_per_block": 1,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 2,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 8, "block_out_channels": (16, 32, 32), "layers_per_block": (1, 1, 1, 1),
        "decoder_block_out_channels": (16, 32), "decoder_layers_per_block": (1, 1, 1),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 3, "spatio_temporal_scaling": (True,) * 3,
        "decoder_spatio_temporal_scaling": (True,) * 2, "decoder_inject_noise": (False,) * 3,
        "downsample_type": ("spatial", "temporal", "spatiotemporal"),
        "upsample_type": ("spatiotemporal",) * 2, "upsample_residual": (True,) * 2, "upsample_factor": (2, 2),
         "patch_size": 2, "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 8, "attention_head_dim": 8, "encoder_block_out_channels": (16, 16, 32),
        "decoder_block_out_channels": (16, 16, 32), "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        # The last stage attends to every place, as SANA's.
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4, "encoder_block_out_channels": (32, 32, 32, 64),
        "decoder_block_out_channels": (32, 32, 32, 64), "layers_per_block": (1, 1, 1, 1, 1),
    },
}  # fmt: skip


def build(name: str, config: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """The diffusers VAE, the independent reference, with weights of a scale where every layer matters."""
    torch.manual_seed(seed)
    module = getattr(diffusers, name.split()[0])(**(config or CONFIGS[name]))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            nn.init.normal_(parameter, std=fan**-0.5, generator=generator)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            shift = 1.0 if name.endswith(("var", "std")) else 0.0
            buffer.copy_(shift + 0.3 * torch.rand(buffer.shape, generator=generator))
    return module.eval().requires_grad_(False)


def packing(name: str) -> int:
    """How many places of the decoder are one of the socket's, per side."""
    return 2 if name == "AutoencoderKLFlux2" else 1


def tiled(module: nn.Module, edge: int) -> nn.Module:
    """A copy that diffusers works through in tiles of `edge` pixels with the overlap of its class."""
    module = copy.deepcopy(module)
    module.use_tiling = True
    for side in ("height", "width"):
        minimum, stride = f"tile_sample_min_{side}", f"tile_sample_stride_{side}"
        if hasattr(module, stride):
            setattr(module, stride, getattr(module, stride) * edge // getattr(module, minimum))
        if hasattr(module, latent := f"tile_latent_min_{side}"):
            setattr(module, latent, getattr(module, latent) * edge // getattr(module, minimum))
        if hasattr(module, minimum):
            setattr(module, minimum, edge)
    if hasattr(module, "tile_sample_min_size"):
        module.tile_latent_min_size = module.tile_latent_min_size * edge // module.tile_sample_min_size
        module.tile_sample_min_size = edge
    return module


def ldm_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's tensors in the naming of Stability and Black Forest Labs."""
    levels = len(module.config.block_out_channels)
    renamed = {}
    for name, tensor in module.state_dict().items():
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
        if up:
            name = f"decoder.up.{levels - 1 - int(up[1])}.{up[2]}"
        for ours, theirs in (
            ("down_blocks", "down"), ("resnets.", "block."), ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        is_linear = ".attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor[..., None, None] if is_linear else tensor
    return renamed


def wan_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's tensors in the naming of Wan 2.1."""
    renamed = {}
    for name, tensor in module.state_dict().items():
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name)
        if up:
            place = 4 * int(up[1]) + (int(up[3]) if up[2] == "resnets" else 3)
            name = f"decoder.upsamples.{place}.{up[4]}"
        for ours, theirs in (
            (r"down_blocks", "downsamples"), (r"mid_block.resnets.0", "middle.0"), (r"norm_out", "head.0"),
            (r"mid_block.resnets.1", "middle.2"), (r"mid_block.attentions.0", "middle.1"),
            (r"conv_shortcut", "shortcut"), (r"coder.conv_out", "coder.head.2"),
            (r"coder.conv_in", "coder.conv1"), (r"^post_quant_conv", "conv2"), (r"^quant_conv", "conv1"),
        ):  # fmt: skip
            name = re.sub(ours, theirs, name)
        if "middle.1" not in name and not re.match(r"conv|.*coder\.conv", name):
            for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
                name = name.replace(f".{ours}.", f".residual.{theirs}.")
        renamed[name] = tensor
    return renamed
