"""Calls of tiny models that draw sound, shapes in space and pixels, of classes that came after 0.8.0."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from worker.models.comfyui.cases.draw import PROMPT, SMALL, THOUSANDS, Case, Draw
from worker.models.comfyui.cases.sizes import CHANNELS, TEXT, Z_IMAGE, Size

ACE: Size = {
    "in_channels": 8, "out_channels": 8, "num_layers": 2, "inner_dim": 64, "attention_head_dim": 32,
    "num_attention_heads": 2, "mlp_ratio": 2.0, "max_position": 512, "rope_theta": 1000000.0,
    "speaker_embedding_dim": 512, "text_embedding_dim": TEXT, "ssl_latent_dims": [16, 12],
    "lyric_encoder_vocab_size": 50, "lyric_hidden_size": 1024, "max_width": 128,
}  # fmt: skip
ACE15: Size = {
    "hidden_size": 128, "text_hidden_dim": TEXT, "num_dit_layers": 4, "num_lyric_layers": 1,
    "num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "sliding_window": 5, "fsq_dim": 64, "encoder_hidden_size": 64,
    "encoder_intermediate_size": 96, "encoder_num_heads": 4,
}  # fmt: skip
Z_IMAGE_PIXELS: Size = Z_IMAGE | {
    "in_channels": 3, "patch_size": 4, "decoder_hidden_size": 32, "decoder_num_res_blocks": 2,
    "decoder_max_freqs": 4, "decoder_in_channels": 48, "use_x0": True,
}  # fmt: skip
PIXELDIT: Size = {
    "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 16, "pixel_attn_hidden_size": 48,
    "pixel_num_groups": 2, "patch_depth": 3, "pixel_depth": 2, "patch_size": 4, "txt_embed_dim": TEXT,
    "txt_max_length": 16,
}  # fmt: skip
PID: Size = PIXELDIT | {"lq_hidden_dim": 32, "lq_num_res_blocks": 1, "lq_interval": 2}
PID15: Size = PID | {
    "lq_conv_padding_mode": "replicate", "lq_gate_per_token": True, "pit_lq_inject": True,
    "rope_ref_h": 2048, "rope_ref_w": 2048,
}  # fmt: skip
TRIPOSPLAT: Size = {
    "q_token_length": 35, "model_channels": 64, "cond_channels": TEXT, "num_blocks": 2,
    "num_refiner_blocks": 2, "num_head_channels": 32, "cond2_channels": 24,
}  # fmt: skip
# The prompt's numbers of special tokens are the published ones.
HIDREAM_O1: Size = {
    "text_config_overrides": {
        "vocab_size": 151680, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_dims": [4, 2, 2],
    },
    "vision_config_overrides": {
        "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "depth": 1, "num_position_embeddings": 16,
    },
}  # fmt: skip
# ComfyUI gives all of its files 12 heads, and 16 x 16 x 16 places of a dense grid.
TRELLIS: Size = {
    "resolution": 32, "in_channels": 8, "out_channels": 8, "model_channels": 144, "cond_channels": TEXT,
    "num_blocks": 2, "num_heads": 12, "mlp_ratio": 2.0, "init_txt_model": True,
}  # fmt: skip
PIXAL: Size = TRELLIS | {
    f"{what}_{model}": value
    for model in ("structure", "shape", "texture")
    for what, value in (("image_attn_mode", "proj"), ("proj_in_channels", 20))
}


def _ace(d: Draw) -> Any:
    lyrics = torch.arange(9).repeat(d.batch, 1)
    given = {"lyric_token_idx": lyrics, "speaker_embeds": torch.zeros(d.batch, 512), "lyrics_strength": 0.9}
    return (d(8, 16, 37), d.time(THOUSANDS)), {"context": d.prompt(), **given}


def _ace15(d: Draw, **more: Any) -> Any:
    sound = {"lyric_embed": d(9, TEXT), "refer_audio": d(64, 73)}
    return (d(64, 73), d.time()), {"context": d.prompt(), **sound, **more}


def _z_image_pixels(d: Draw) -> Any:
    return (d(3, *PICTURE), d.time(), d.prompt(), PROMPT), {}


def _pixeldit(d: Draw, **more: Any) -> Any:
    return (d(3, *PICTURE), d.time(THOUSANDS)), {"context": d.prompt(), "attention_mask": d.mask(), **more}


def _pid(d: Draw) -> Any:
    return _pixeldit(d, lq_latent=d(16, 3, 4), degrade_sigma=d.time(0.1))


def _triposplat(d: Draw) -> Any:
    return ([d(35, 16), d(1, 5)], d.time()), {"context": d.prompt(tokens=41), "ref_latents": [d(24, *SMALL)]}


def _hidream_o1(d: Draw, *sizes: tuple[int, int]) -> Any:
    """An image of 35 patches, and references of these sizes. Faint: what is drawn is taken off it."""
    from comfy.ldm.hidream_o1.conditioning import build_extra_conds  # where ComfyUI is

    noise, references = 0.1 * d(3, 160, 224), [d(*size, 3).sigmoid()[:1] for size in sizes]
    prompt = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 151673]])
    given = build_extra_conds(prompt, noise[:1], references)
    rows = {
        name: part if name == "ar_len" else part.repeat(d.batch, *[1] * (part.ndim - 1))
        for name, part in given.items()
    }
    return (noise, d.time(THOUSANDS)), {"context": d.prompt(), **rows}


def _trellis(d: Draw, mode: str = "", projected: bool = False) -> Any:
    """A dense grid without a mode; or 35 voxels, at places that are the same for all rows."""
    given = {"embeds": d(7, TEXT)}
    if not mode:
        given |= {"trellis2_proj_feats": d(4096, 20)} if projected else {}
        return (d(32, 16, 16, 16), d.time(), d.prompt()), given
    voxels = Draw(1, seed=2)
    places = torch.stack([torch.zeros(35), torch.arange(35), torch.arange(35) // 5, torch.arange(35) % 7], 1)
    given |= {
        "trellis2_coords": places.int(),
        "trellis2_coord_counts": torch.tensor([35]),
        "trellis2_generation_mode": mode,
        "trellis2_shape_slat": voxels(35, 8)[0],
    }
    given |= {"trellis2_proj_feats": voxels(35, 20)[0]} if projected else {}
    return (d(8, 35, 1), d.time(), d.prompt()), given


def _music(d: Draw, tokens: int, frames: int) -> Any:
    """Some tokens, of which frames of the language model's hidden states tell the first."""
    given = {"context": d(frames, 8 * 4096), "conditioning_scale": torch.ones(d.batch, 1, 1)}
    return (d(CHANNELS, tokens), d.time()), given


def _build_music(made: Any, width: int, depth: int, *, operations: Any, **where: Any) -> nn.Module:
    """A tiny MiniMax Music of this ComfyUI's parts: the class itself takes no width."""
    dit, device, dtype = sys.modules[made.__module__], where["device"], where["dtype"]
    linear, convolution = partial(operations.Linear, **where), partial(operations.Conv1d, **where)
    model, outer, inner = (
        _bare(part) for part in (made, dit.DiffusionTransformer, dit.ContinuousTransformer)
    )
    inner.project_in = linear(3 * CHANNELS, width, bias=False)
    inner.project_out = linear(width, CHANNELS, bias=False)
    inner.rotary_pos_emb = dit.RotaryEmbedding(width // 4, dtype, device)
    blocks = [
        dit.TransformerBlock(width, width // 2, 2 * width, dtype, device, operations) for _ in range(depth)
    ]
    inner.layers = nn.ModuleList(blocks)
    outer.transformer = inner
    outer.timestep_features = dit.FourierFeatures(1, 16, dtype, device)
    outer.to_timestep_embed = nn.Sequential(linear(16, width), nn.SiLU(), linear(width, width))
    outer.preprocess_conv = convolution(3 * CHANNELS, 3 * CHANNELS, 1, bias=False)
    outer.postprocess_conv = convolution(CHANNELS, CHANNELS, 1, bias=False)
    model.latent_conditioners = nn.Sequential(convolution(4096, CHANNELS, 3, padding=1))
    model.diffusion_transformer, model.dtype = outer, dtype
    model.cond_layer_logits = nn.Parameter(torch.empty(8, **where))
    model.cond_layer_scale = nn.Parameter(torch.empty(1, **where))
    return model


def _bare(part: type[nn.Module]) -> Any:
    """A module of a class without what its constructor gives it."""
    module = part.__new__(part)
    nn.Module.__init__(module)
    return module


_ACE15 = ("ace.ace_step15", "AceStepConditionGenerationModel")
_HIDREAM_O1 = ("hidream_o1.model", "HiDreamO1Transformer")
_MUSIC = ("minimax_music.dit", "MiniMaxMusic3DiT", {"width": 64, "depth": 2})
_TRELLIS = ("trellis2.model", "Trellis2")
_PID = ("pixeldit.pid", "PidNet")
PICTURE = (19, 27)  # 35 patches of 4, the last ones not whole

CASES: dict[str, Case] = {
    "ace step": Case("ace.model", "ACEStepTransformer2DModel", ACE, _ace),
    "ace step 1.5": Case(*_ACE15, ACE15, lambda d: _ace15(d, is_covers=False, replace_with_null_embeds=True)),
    "ace step 1.5 cover": Case(*_ACE15, ACE15, lambda d: _ace15(d, is_covers=True)),
    "ace step 1.5 codes": Case(
        *_ACE15, ACE15, lambda d: _ace15(d, audio_codes=torch.arange(12).repeat(d.batch, 1))
    ),
    "hidream o1": Case(*_HIDREAM_O1, HIDREAM_O1, _hidream_o1),
    "hidream o1 edit": Case(*_HIDREAM_O1, HIDREAM_O1, lambda d: _hidream_o1(d, (100, 80))),
    "trellis structure": Case(*_TRELLIS, TRELLIS, _trellis, batches=(2,)),
    **{
        f"trellis {mode}": Case(*_TRELLIS, TRELLIS, partial(_trellis, mode=mode))
        for mode in ("shape_generation_512", "shape_generation", "texture_generation")
    },
    "pixal structure": Case(*_TRELLIS, PIXAL, partial(_trellis, projected=True), batches=(2,)),
    "pixal texture": Case(*_TRELLIS, PIXAL, partial(_trellis, mode="texture_generation", projected=True)),
    "minimax music": Case(*_MUSIC, partial(_music, tokens=37, frames=20), build=_build_music),
    # In two windows.
    "minimax music long": Case(*_MUSIC, partial(_music, tokens=700, frames=203), build=_build_music),
    "z-image pixels": Case("lumina.model", "NextDiTPixelSpace", Z_IMAGE_PIXELS, _z_image_pixels),
    "pixeldit": Case("pixeldit.model", "PixDiT_T2I", PIXELDIT, _pixeldit),
    "pid": Case(*_PID, PID, _pid),
    "pid 1.5": Case(*_PID, PID15, _pid),
    "triposplat": Case("triposplat.model", "LatentSeqMMFlowModel", TRIPOSPLAT, _triposplat),
}
