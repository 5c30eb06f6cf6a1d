"""Tiny VAEs of every class the ranks run, with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

PICTURE = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    # SD3 and FLUX.1: 16 channels and no quantisation convolutions.
    "AutoencoderKL": {
        **PICTURE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "AutoencoderKLFlux2": {**PICTURE, "latent_channels": 8, "decoder_block_out_channels": (32, 64, 64)},
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "scale_factor_spatial": 4, "scale_factor_temporal": 4,
    },
    # As Wan 2.2: in patches, with residual stages.
    "AutoencoderKLWan 2.2": {
        "base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
        "temperal_downsample": [True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
        "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
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
        "decoder_layers_per_block": (1, 1, 1), "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()),
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "sample_height": 64, "sample_width": 64,
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
