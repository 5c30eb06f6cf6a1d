"""Calls of tiny models that draw videos, of classes that came after 0.8.0."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch

from worker.models.comfyui.cases import sizes
from worker.models.comfyui.cases.draw import FLOW, SMALL_VIDEO, STILL, THOUSANDS, VIDEO, Case, Draw
from worker.models.comfyui.cases.sizes import CHANNELS, TEXT, WAN, Size

HALF = (3, 5, 7)  # a pose at half the size, which the class pads to 36 tokens
MUSIC = (3, 8, 12)  # eight sounds for each of its frames: they share a frame's tokens
CLIP = (257, 1280)

LTX23: Size = sizes.LTXAV | {
    "cross_attention_adaln": True, "apply_gated_attention": True, "caption_proj_before_connector": True,
    "caption_channels": 48,  # an older class, which knows no such model, reads as many
    "connector_attention_head_dim": 32, "audio_connector_attention_head_dim": 16,
}  # fmt: skip
SCAIL: Size = WAN | {"model_type": "scail", "in_dim": 20}
SCAIL2: Size = SCAIL | {"model_type": "scail2"}
ANIMATE2: Size = WAN | {"model_type": "animate2", "in_dim": 36}
WANDANCER: Size = WAN | {
    "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 1], "music_dim": 32,
    "music_heads": 2, "music_latent_dim": 32,
}  # fmt: skip
COGVIDEOX: Size = {
    "num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 48, "text_embed_dim": TEXT,
    "num_layers": 2, "sample_width": 14, "sample_height": 10, "sample_frames": 9,
    "max_text_seq_length": 11, "use_rotary_positional_embeddings": True,
}  # fmt: skip
COGVIDEOX_LEARNED: Size = COGVIDEOX | {
    "num_attention_heads": 3, "in_channels": 32,
    "use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": True,
}  # fmt: skip
COGVIDEOX_15: Size = COGVIDEOX | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 48}
MINIMAX_H3: Size = {
    "hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 32, "ffn_hidden_size": 96, "text_dim": TEXT, "timestep_input_dim": 32,
    "time_embed_hidden_size": 64, "time_embed_dim": 48, "rope_inv_freq_len": 5,
}  # fmt: skip
SEEDVR2: Size = {
    "norm_eps": 1e-5, "num_layers": 32, "mlp_type": "swiglu", "vid_dim": 48, "txt_in_dim": TEXT, "heads": 2,
    "head_dim": 32, "mm_layers": 1, "rope_dim": 30, "vid_out_norm": True,
}  # fmt: skip


# ---------------------------------------------------------------------- LTX-2


def _ltxav(d: Draw, width: int = 2 * TEXT, video: Any = SMALL_VIDEO, time: Any = None, **more: Any) -> Any:
    first = ([d(CHANNELS, *video), d(8, 9, 16)], time or (d.time(), d.time()), d.prompt(width))
    return first, {"frame_rate": 25, **more}


def _ltxav_masked(d: Draw, inpaint: bool = False) -> Any:
    """Frames, or parts of them, that are known already; and sound."""
    mask = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1).expand(d.batch, 1, *SMALL_VIDEO).clone()
    if inpaint:
        mask[..., 2:4] = 0.25
    sound = d(9, 1).sigmoid()[:1].expand(d.batch, 9, 1)
    time = (FLOW * mask.flatten(2).transpose(1, 2), FLOW * sound)
    return _ltxav(d, time=time, denoise_mask=mask, audio_denoise_mask=sound.view(d.batch, 1, 9, 1))


def _ltxav_guide(d: Draw, strength: float = 1.0) -> Any:
    """A picture behind the video that says what a frame looks like; a column of it does not count."""
    mask = torch.ones(d.batch, 1, 4, *SMALL_VIDEO[1:])
    mask[:, :, 3] = 0.2
    mask[..., 3, :, 6] = -1.0
    places = (d(3, 35, 1).sigmoid() * 50)[:1].expand(d.batch, -1, -1, 2)
    entry = {"pre_filter_count": 35, "strength": strength, "pixel_mask": None, "latent_shape": [1, 5, 7]}
    return _ltxav(
        d,
        video=(4, *SMALL_VIDEO[1:]),
        time=(FLOW * mask.flatten(2).transpose(1, 2), d.time()),
        denoise_mask=mask,
        keyframe_idxs=places,
        guide_attention_entries=[entry],
    )


def _ltxv_guide(d: Draw) -> Any:
    from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier  # once there is a ComfyUI

    (latents, (time, _), text), more = _ltxav_guide(d, strength=0.5)
    if "start_end" not in signature(SymmetricPatchifier).parameters:  # in 0.3.64 a place has no end
        more["keyframe_idxs"] = more["keyframe_idxs"][..., 0]
    return (latents[0], time, text[..., :TEXT], None), more


def _ltxav_silent(d: Draw) -> Any:
    first, more = _ltxav(d)
    return (first[0][:1], *first[1:]), more


# ---------------------------------------------------------------------- Wan


def _wan(d: Draw, channels: int = CHANNELS, video: Any = VIDEO, **more: Any) -> Any:
    return (d(channels, *video), d.time(THOUSANDS), d.prompt()), more


def _scail(d: Draw, references: int = 1, **more: Any) -> Any:
    given = {"reference_latent": d(20, references, *STILL), "pose_latents": d(20, *HALF)}
    return _wan(d, 20, clip_fea=d(*CLIP), **given, **more)


def _scail2(d: Draw, **more: Any) -> Any:
    return _scail(d, 2, ref_mask_latents=d(28, 5, *STILL), sam_latents=d(28, *HALF), **more)


def _wandancer(d: Draw, **more: Any) -> Any:
    seen = {"clip_fea": d(*CLIP), "clip_fea_ref": d(*CLIP)}
    return _wan(d, 36, MUSIC, audio_embed=d(31, 35), **seen, **more)


def _animate2(d: Draw, pose: bool = True, **more: Any) -> Any:
    """The first frame is the reference; the others have one of a pose each."""
    if pose:
        more |= {
            "pose_latents": d(CHANNELS, 2, *STILL),
            "clip_fea_pose": d(*CLIP),
            "context_pose": d.prompt(),
        }
    return _wan(d, 36, clip_fea=d(*CLIP), **more)


# ---------------------------------------------------------------------- others


def _cogvideox(d: Draw, channels: int = CHANNELS, **more: Any) -> Any:
    return _wan(d, channels, **more)


def _minimax(d: Draw, **payload: Any) -> Any:
    from comfy.ldm.minimax.model import PackedLayout  # of later versions

    payload["layout"] = PackedLayout(11, 3, 10, 14, 9, payload.get("keyframes"), payload.get("refs"))
    mask = payload.pop("masks", {})
    given = {"minimax_payload": {"seed": 3, "audio_scale": 1.0, **payload}, **mask}
    return ([d(24, 3, 9, 13), d(32, 2, 9)], d.time(THOUSANDS), d.prompt(64)), given


def _minimax_frames(d: Draw) -> Any:
    """First and last frames, sound that is known, pictures in the prompt."""
    picture, sound = d(24, 1, *STILL), d(32, 2, 3)
    frames = [
        {"resolved_frame_index": 0, "latent": picture, "audio_latent": sound},
        {"resolved_frame_index": 8, "latent": picture.flip(-1), "audio_latent": None},
    ]
    levels = torch.tensor([0.0, 0.5, 1.0])
    masks = {
        "denoise_mask": levels.view(1, 1, 3, 1, 1).expand(1, 1, 3, 9, 13),
        "audio_denoise_mask": levels.repeat(6).view(1, 1, 2, 9),
    }
    return _minimax(
        d,
        masks=masks,
        keyframes=frames,
        cond_video_latents=[picture, picture.flip(-1)],
        cond_audio_latents=[sound],
        text_token_tags=torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]),
    )


def _minimax_references(d: Draw) -> Any:
    picture, clip, sound, voice = d(24, 1, 6, 10), d(24, 2, 6, 6), d(32, 2, 3), d(32, 2, 4)
    references = [
        {"kind": "image", "latent_h": 6, "latent_w": 10, "latent": picture},
        {"kind": "audio", "ref_audio_t": 3, "audio_latent": sound},
        {"kind": "video_audio", "ref_audio_t": 4, "latent_t": 2, "latent_h": 6, "latent_w": 6},
    ]
    return _minimax(d, refs=references, cond_video_latents=[picture, clip], cond_audio_latents=[sound, voice])


def _seedvr2(d: Draw) -> Any:
    return (d(CHANNELS, *VIDEO), d.time(THOUSANDS), d.prompt()), {"condition": d(CHANNELS + 1, *VIDEO)}


_LTXV, _LTXAV = ("lightricks.model", "LTXVModel"), ("lightricks.av_model", "LTXAVModel")
_COGVIDEOX = ("cogvideo.model", "CogVideoXTransformer3DModel")
_SCAIL, _SCAIL2 = ("wan.model", "SCAILWanModel"), ("wan.model", "SCAIL2WanModel")
_ANIMATE2, _SEEDVR2 = ("wan.model_animate2", "WanAnimate2Model"), ("seedvr.model", "NaDiT")
_WANDANCER, _MINIMAX = ("wan.model_wandancer", "WanDancerModel"), ("minimax.model", "MiniMaxH3Model")

CASES: dict[str, Case] = {
    "ltxav frames": Case(*_LTXAV, sizes.LTXAV, _ltxav_masked),
    "ltxv guide strength": Case(*_LTXV, sizes.LTXV, _ltxv_guide),
    "ltxav inpaint": Case(*_LTXAV, sizes.LTXAV, partial(_ltxav_masked, inpaint=True)),
    "ltxav guide": Case(*_LTXAV, sizes.LTXAV, _ltxav_guide),
    "ltxav guide strength": Case(*_LTXAV, sizes.LTXAV, partial(_ltxav_guide, strength=0.5)),
    "ltxav voice": Case(*_LTXAV, sizes.LTXAV, lambda d: _ltxav(d, ref_audio={"tokens": d(5, 128)[:1]})),
    "ltxav silent": Case(*_LTXAV, sizes.LTXAV, _ltxav_silent),
    "ltx 2.3": Case(*_LTXAV, LTX23, partial(_ltxav, width=96)),
    "scail": Case(*_SCAIL, SCAIL, _scail),
    "scail 2": Case(*_SCAIL2, SCAIL2, partial(_scail2, ref_mask_flag=True)),
    "scail 2 replacing": Case(*_SCAIL2, SCAIL2, partial(_scail2, ref_mask_flag=False)),
    "wandancer": Case(*_WANDANCER, WANDANCER, _wandancer),
    "wandancer keyframes": Case(*_WANDANCER, WANDANCER, partial(_wandancer, fps=7.5)),
    "wan animate 2": Case(*_ANIMATE2, ANIMATE2, _animate2),
    "wan animate 2 strengths": Case(
        *_ANIMATE2, ANIMATE2, partial(_animate2, pose_strength=0.7, reference_strength=0.8)
    ),
    "wan animate 2 without pose": Case(*_ANIMATE2, ANIMATE2, partial(_animate2, pose=False)),
    "wan causal": Case("wan.ar_model", "CausalWanModel", WAN, _wan),
    "cogvideox": Case(*_COGVIDEOX, COGVIDEOX, _cogvideox),
    "cogvideox i2v": Case(*_COGVIDEOX, COGVIDEOX_LEARNED, partial(_cogvideox, channels=32)),
    "cogvideox 1.5 i2v": Case(*_COGVIDEOX, COGVIDEOX_15, lambda d: _cogvideox(d, 32, ofs=d.time(2.0))),
    "seedvr2": Case(*_SEEDVR2, SEEDVR2, _seedvr2, batches=(2,)),
    "minimax h3": Case(*_MINIMAX, MINIMAX_H3, _minimax, batches=(1,)),
    "minimax h3 frames": Case(*_MINIMAX, MINIMAX_H3, _minimax_frames, batches=(1,)),
    "minimax h3 references": Case(*_MINIMAX, MINIMAX_H3, _minimax_references, batches=(1,)),
}
