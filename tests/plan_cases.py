"""Tiny random models of diffusers' transformer classes, and what they are called with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

# Sizes by the names that constructors give them; a class takes those it knows.
_BY_VALUE: dict[Any, str] = {
    1: "num_refiner_layers cross_attn_interval use_rotary_positional_embeddings",
    2: "num_layers num_single_layers num_cross_attention_heads n_layers cross_attn_num_heads LFE_num_heads "
    "LFE_num_id_token patch_size",
    4: "num_attention_heads in_channels out_channels audio_num_attention_heads n_heads n_kv_heads "
    "LFE_num_querie",
    5: "text_len_t5 LFE_depth video_length",
    8: "sample_size audio_in_channels audio_out_channels audio_attention_head_dim LFE_dim_head",
    16: "attention_head_dim freq_dim time_embed_dim pos_embed_max_size cross_attn_dim_head",
    24: "pooled_projection_dim text_embed_2_dim image_embed_dim cross_attention_dim_t5 LFE_id_dim "
    "LFE_vit_dim",
    32: "joint_attention_dim text_dim text_embed_dim caption_channels audio_cross_attention_dim cap_feat_dim "
    "cross_attention_head_dim",
    42: "LFE_output_dim",
    64: "caption_projection_dim ffn_dim hidden_size dim cross_attention_dim",
    (4, 6, 6): "axes_dims_rope rope_axes_dim axes_dims",
}
SMALL = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
PACKED = {"in_channels": 16, "patch_size": 1, "axes_dims_rope": (4, 4, 4, 4)}
FEW_TEXT = 2  # tokens: fewer than ranks, on four of them


@dataclass(frozen=True)
class Case:
    """A class in one configuration.

    Args:
        kind: what its hidden states are.
        config: constructor's arguments beside SMALL.
        given: forward's arguments beside the usual ones; None takes one away.
        short: whether it takes a prompt of FEW_TEXT tokens.
    """

    family: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    short: bool = True

    def build(self) -> torch.nn.Module:
        """The model: every weight random, also those a class starts at zero, which would hide errors."""
        import diffusers

        torch.manual_seed(0)
        made = getattr(diffusers, self.family)
        model = made(**_known(made.__init__, SMALL | self.config)).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
        return model

    def inputs(self, batch: int, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
        """Of so many frames, rows and columns of tokens; in the first row two text tokens are masked."""
        torch.manual_seed(batch)
        given = _usual(self.kind, batch, grid, text)
        changed = {k: v[:batch] if isinstance(v, torch.Tensor) else v for k, v in self.given.items()}
        return given | changed


def run(model: torch.nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of one call."""
    found = model(**_known(model.forward, given), return_dict=False)
    return [tensor for out in found for tensor in (out if isinstance(out, list) else [out])]


def _known(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: values[name] for name in names if values.get(name) is not None}


def _usual(kind: str, b: int, grid: tuple[int, int, int], t: int) -> dict[str, Any]:
    r, (f, h, w) = torch.randn, grid
    n, video, text5, time = h * w, r(b, 4, f, 2 * h, 2 * w), r(b, 5, 24), torch.full((b,), 500.0)
    mask, mask5 = (torch.arange(size) < torch.tensor([[max(size - 2, 1)], [size]])[:b] for size in (t, 5))
    hidden = {
        "video": video,
        "image": video[:, :, 0],
        "square": r(b, 4, 2 * h, 2 * h),
        "tokens": r(b, n, 16),
        "frames": video.transpose(1, 2),
        "pairs": r(b, 2 * f, 4, 2 * h, 2 * w),
        "video tokens": r(b, f * n, 16),
    }
    return {
        "hidden_states": hidden[kind], "encoder_hidden_states": r(b, t, 32), "encoder_attention_mask": mask,
        "timestep": torch.rand(b, f * n) * 999 if kind == "video tokens" else time,
        "encoder_hidden_states_mask": mask, "guidance": time, "ofs": time, "pooled_projections": r(b, 24),
        "encoder_hidden_states_image": text5,
        "image_rotary_emb": (r(n, 16), r(n, 16)) if kind == "image" else (r(f * n, 16), r(f * n, 16)),
        "img_shapes": [[(1, h, w)]] * b, "img_ids": torch.arange(4.0 * n).view(n, 4),
        "txt_ids": torch.ones(t, 4), "encoder_hidden_states_2": text5, "encoder_attention_mask_2": mask5,
        "image_embeds": text5[:, :3], "encoder_hidden_states_t5": text5, "text_embedding_mask": mask,
        "text_embedding_mask_t5": mask5, "image_meta_size": r(b, 6),
        "style": torch.zeros(b, dtype=torch.long), "id_cond": r(b, 24), "id_vit_hidden": [text5] * 5,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "class_labels": torch.arange(b),
        "x": [r(4, 1, 2 * h, 2 * (w + 9 * i)) for i in range(b)], "t": time / 1000,
        "cap_feats": [r(t + 30 * i, 32) for i in range(b)], "audio_hidden_states": r(b, t + 2, 8),
        "audio_encoder_hidden_states": r(b, t, 32), "audio_timestep": time,
        "audio_encoder_attention_mask": mask, "num_frames": f, "height": h, "width": w,
        "audio_num_frames": t + 2,
    }  # fmt: skip


_FIVE = {
    "encoder_hidden_states": torch.arange(320.0).sin().view(2, 5, 32),
    "text_embedding_mask": torch.ones(2, 5),
}
_WAN = {"patch_size": (1, 2, 2)}
_WAN_TEXT = {"encoder_hidden_states": torch.arange(2.0**15).sin().view(2, 512, 32)}
_LATTE = {"num_embeds_ada_norm": 9, "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
_WAN_IMAGE = _WAN | {"image_dim": 24, "added_kv_proj_dim": 64}
_NO_GUIDANCE = {"guidance": None}
_HV = "HunyuanVideoTransformer3DModel"
_HUNYUAN_DIT = {"num_layers": 4, "cross_attention_dim": 32, "text_len": 5}
_PIXART = {"out_channels": 8, "use_additional_conditions": False}
_LTX2 = "LTX2VideoTransformer3DModel"

CASES = {
    "Wan 2.1 T2V": Case("WanTransformer3DModel", "video", _WAN, {"encoder_hidden_states_image": None}),
    "Wan 2.1 I2V": Case("WanTransformer3DModel", "video", _WAN_IMAGE, _WAN_TEXT),
    "Qwen-Image": Case("QwenImageTransformer2DModel", "tokens", {"in_channels": 16}, _NO_GUIDANCE),
    "HunyuanVideo": Case(_HV, "video"),
    "HunyuanVideo I2V": Case(_HV, "video", {"image_condition_type": "token_replace"}),
    "HunyuanVideo 1.5": Case("HunyuanVideo15Transformer3DModel", "video"),
    "CogVideoX": Case("CogVideoXTransformer3DModel", "frames"),
    "CogVideoX 1.5": Case("CogVideoXTransformer3DModel", "pairs", {"patch_size_t": 2, "ofs_embed_dim": 16}),
    "ConsisID": Case("ConsisIDTransformer3DModel", "frames", {"is_train_face": True}),
    "Mochi": Case("MochiTransformer3DModel", "video", {"num_layers": 3, "pooled_projection_dim": 32}),
    "PixArt": Case("PixArtTransformer2DModel", "image", _PIXART),
    "HunyuanDiT": Case("HunyuanDiT2DModel", "image", _HUNYUAN_DIT, _FIVE, short=False),
    "Latte": Case("LatteTransformer3DModel", "video", _LATTE, {"encoder_attention_mask": None}),
    "Flux.2": Case("Flux2Transformer2DModel", "tokens", PACKED),
    "Z-Image": Case("ZImageTransformer2DModel", "image", {}, {"patch_size": 2}),
    "LTX-2": Case(_LTX2, "video tokens", PACKED),
    "LTX-2.3": Case(_LTX2, "video tokens", PACKED | {"rope_type": "split"}),
    "SANA": Case("SanaTransformer2DModel", "image", {"patch_size": 1}, _NO_GUIDANCE),
    "DiT-XL": Case("DiTTransformer2DModel", "square", {"out_channels": 8}),
    "SD3.5 medium": Case(
        "SD3Transformer2DModel", "image", {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    ),
    "SD3.5 medium, 3 heads": Case(
        "SD3Transformer2DModel",
        "image",
        {"dual_attention_layers": (0,), "num_attention_heads": 3, "caption_projection_dim": 48},
    ),
    "FLUX.1": Case("FluxTransformer2DModel", "tokens", PACKED | {"guidance_embeds": True}),
}
