"""Sizes of tiny models of ComfyUI's classes: what their constructors are told, and a file of theirs holds.

A plan is proven on them, on the ComfyUI at hand. Every width is small, every head, block and stream is there.
"""

from __future__ import annotations

from typing import Any

Size = dict[str, Any]

TEXT = 40  # width of a prompt's tokens
POOLED = 24
CHANNELS = 16

WAN: Size = {
    "dim": 48, "ffn_dim": 96, "freq_dim": 32, "text_dim": TEXT, "num_heads": 4, "num_layers": 2,
    "in_dim": CHANNELS, "out_dim": CHANNELS,
}  # fmt: skip
WAN_AUDIO: Size = WAN | {"audio_dim": 32, "audio_inject_layers": [0, 1]}
FLUX: Size = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "vec_in_dim": POOLED, "context_in_dim": TEXT,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
FLUX2: Size = FLUX | {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [8] * 4,
    "qkv_bias": False, "txt_ids_dims": [3], "patch_size": 1,
    "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "mlp_ratio": 3.0,
}  # fmt: skip
CHROMA: Size = {name: value for name, value in FLUX.items() if name != "guidance_embed"} | {
    "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 2, "in_channels": 64, "out_channels": 64,
}  # fmt: skip
RADIANCE: Size = CHROMA | {
    "in_channels": 3, "out_channels": 3, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1,
    "nerf_max_freqs": 4, "nerf_tile_size": 0, "nerf_final_head_type": "conv", "nerf_embedder_dtype": None,
    "use_x0": False,
}  # fmt: skip
HUNYUAN_VIDEO: Size = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": [1, 2, 2], "vec_in_dim": POOLED,
    "context_in_dim": TEXT, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True,
    "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_VIDEO_15: Size = HUNYUAN_VIDEO | {
    "patch_size": [1, 1, 1], "vec_in_dim": None, "guidance_embed": False, "byt5": True,
    "use_cond_type_embedding": True, "vision_in_dim": 20, "depth_single_blocks": 0,
}  # fmt: skip
HUNYUAN_IMAGE: Size = HUNYUAN_VIDEO | {
    "patch_size": [1, 1], "vec_in_dim": None, "axes_dim": [16, 16], "byt5": True,
}  # fmt: skip
QWEN: Size = {
    "in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": TEXT, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
LUMINA: Size = {
    "in_channels": CHANNELS, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1,
    "cap_feat_dim": TEXT, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64], "qk_norm": True,
    "multiple_of": 32,
}  # fmt: skip
Z_IMAGE: Size = LUMINA | {
    "dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 8,
}  # fmt: skip
SD3: Size = {
    "input_size": None, "patch_size": 2, "in_channels": CHANNELS, "depth": 2, "num_blocks": 3,
    "adm_in_channels": POOLED, "num_patches": 144, "pos_embed_max_size": 12, "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128},
    },
}  # fmt: skip
SD35: Size = SD3 | {"x_block_self_attn_layers": [0, 1]}
# ComfyUI tells this one by the width of its prompts.
AURA_TEXT = 2048
AURA: Size = {
    "dim": 64, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 48,
    "cond_seq_dim": AURA_TEXT, "max_seq": 256,
}  # fmt: skip
PIXART: Size = {
    "in_channels": 4, "hidden_size": 72, "depth": 2, "num_heads": 2, "caption_channels": TEXT,
    "pe_interpolation": 1, "micro_condition": False,
}  # fmt: skip
HUNYUAN_DIT: Size = {
    "hidden_size": 64, "depth": 4, "num_heads": 2, "text_states_dim": TEXT, "text_states_dim_t5": 48,
    "text_len": 7, "text_len_t5": 9,
}  # fmt: skip
MOCHI: Size = {
    "in_channels": 12, "hidden_size_x": 64, "hidden_size_y": 48, "depth": 2, "num_heads": 2,
    "mlp_ratio_x": 192.0, "use_t5": True, "t5_feat_dim": TEXT, "t5_token_length": 11, "learn_sigma": False,
    "qk_norm": True, "qkv_bias": False, "timestep_scale": 1000.0,
}  # fmt: skip
LTXV: Size = {
    "in_channels": CHANNELS, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "caption_channels": TEXT, "num_layers": 2,
}  # fmt: skip
LTXAV: Size = LTXV | {
    "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16, "audio_num_attention_heads": 2,
    "rope_type": "split", "use_middle_indices_grid": True,
    "connector_attention_head_dim": 20, "connector_num_attention_heads": 2, "connector_num_layers": 1,
}  # fmt: skip
COSMOS2: Size = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96, "num_blocks": 2, "num_heads": 2,
    "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop",
    "use_adaln_lora": True, "adaln_lora_dim": 16,
}  # fmt: skip
COSMOS1: Size = COSMOS2 | {
    "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
HIDREAM: Size = {
    "patch_size": 2, "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [TEXT, 48],
    "text_emb_dim": POOLED, "axes_dims_rope": [8, 12, 12], "llama_layers": [0, 1, 2, 3],
}  # fmt: skip
KANDINSKY5: Size = {
    "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": POOLED,
    "time_dim": 48, "model_dim": 64, "ff_dim": 128, "visual_embed_dim": 64, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": [8, 12, 12],
}  # fmt: skip
OMNIGEN2: Size = {
    "in_channels": CHANNELS, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": [8, 12, 12],
    "text_feat_dim": TEXT,
}  # fmt: skip
HUNYUAN3D2: Size = {
    "in_channels": CHANNELS, "context_in_dim": TEXT, "hidden_size": 64, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2,
}  # fmt: skip
HUNYUAN3D21: Size = {
    "in_channels": CHANNELS, "hidden_size": 64, "context_dim": TEXT, "depth": 3, "num_heads": 2,
    "num_moe_layers": 1, "num_experts": 2, "guidance_cond_proj_dim": None,
}  # fmt: skip
STABLE_AUDIO: Size = {
    "io_channels": CHANNELS, "embed_dim": 64, "cond_token_dim": 64, "global_cond_dim": POOLED, "depth": 2,
    "num_heads": 2,
}  # fmt: skip
STABLE_AUDIO3: Size = STABLE_AUDIO | {"global_cond_type": "adaLN", "local_add_cond_dim": 5}
