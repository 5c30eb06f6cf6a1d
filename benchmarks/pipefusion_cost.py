"""What a stage of PipeFusion computes around its blocks, at published sizes: floating point operations.

Every stage runs the class's own forward for every patch: also the embeddings of the whole picture and text,
and in the last stage the head. Counted on meta tensors: the load of the machine does not matter.

Usage: python -m benchmarks.pipefusion_cost
"""

from __future__ import annotations

import re
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plan_cases import run
from worker.models.plans.diffusers import PLANS

STAGES = PATCHES = 4
LIMIT = 0.03  # of a stage's blocks


def _r(*shape: int) -> torch.Tensor:
    return torch.zeros(1, *shape)


_TIME = torch.ones(1)
_FLUX = {"hidden_states": _r(4096, 64), "timestep": _TIME, "guidance": _TIME, "img_ids": torch.zeros(4096, 3)}
_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.1 dev, 1024 x 1024": (
        "FluxTransformer2DModel", {"guidance_embeds": True},
        _FLUX | {"encoder_hidden_states": _r(512, 4096), "pooled_projections": _r(768),
                 "txt_ids": torch.zeros(512, 3)},
    ),
    "SD3.5 large, 1024 x 1024": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "in_channels": 16,
         "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
         "pos_embed_max_size": 192},
        {"hidden_states": _r(16, 128, 128), "encoder_hidden_states": _r(333, 4096),
         "pooled_projections": _r(2048), "timestep": _TIME},
    ),
    "PixArt-Sigma, 1024 x 1024": (
        "PixArtTransformer2DModel", {"use_additional_conditions": False, "caption_channels": 4096},
        {"hidden_states": _r(4, 128, 128), "encoder_hidden_states": _r(300, 4096), "timestep": _TIME,
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "HunyuanDiT, 1024 x 1024": (
        "HunyuanDiT2DModel",
        {"num_layers": 40, "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4,
         "patch_size": 2, "hidden_size": 1408, "mlp_ratio": 4.3637, "activation_fn": "gelu-approximate"},
        {"hidden_states": _r(4, 128, 128), "timestep": _TIME, "encoder_hidden_states": _r(77, 1024),
         "text_embedding_mask": _r(77), "encoder_hidden_states_t5": _r(256, 2048),
         "text_embedding_mask_t5": _r(256), "image_meta_size": _r(6),
         "style": torch.zeros(1, dtype=torch.long),
         "image_rotary_emb": (torch.zeros(4096, 88), torch.zeros(4096, 88))},
    ),
    "Qwen-Image, 1024 x 1024": (
        "QwenImageTransformer2DModel", {},
        {"hidden_states": _r(4096, 64), "encoder_hidden_states": _r(200, 3584), "timestep": _TIME,
         "img_shapes": [[(1, 64, 64)]]},
    ),
    "Wan 2.1 1.3B, 480p": (
        "WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        {"hidden_states": _r(16, 21, 60, 104), "encoder_hidden_states": _r(512, 4096), "timestep": _TIME},
    ),
    "CogVideoX 2B, 480p": (
        "CogVideoXTransformer3DModel", {},
        {"hidden_states": _r(13, 16, 60, 90), "encoder_hidden_states": _r(226, 4096), "timestep": _TIME},
    ),
}  # fmt: skip


def share(family: str, config: dict[str, Any], given: dict[str, Any]) -> float:
    """What is computed around the blocks for one patch, as a share of a stage's blocks for it."""
    with torch.device("meta"):
        model = getattr(diffusers, family)(**config).eval()
    given = {name: _meta(value) for name, value in given.items()}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run(model, given)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    lists = "|".join(name for region in PLANS[family].regions for name in region.blocks)
    blocks = sum(n for name, n in counts.items() if re.fullmatch(rf"{family}\.({lists})\.\d+", name))
    return (counts["Global"] - blocks) / (blocks / (STAGES * PATCHES))


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return tuple(map(_meta, value)) if isinstance(value, tuple) else value


def main() -> None:
    """Print a line per model."""
    print(f"around the blocks, of a stage's blocks: {STAGES} stages, {PATCHES} patches; limit {LIMIT:.0%}")
    for name, case in _MODELS.items():
        found = share(*case)
        print(f"{name:28} {found:6.2%}{'' if found <= LIMIT else '  over the limit'}")


if __name__ == "__main__":
    main()
