"""Calls of tiny models, of classes that ComfyUI 0.8.0 has.

Latents have odd numbers of tokens, and prompts too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from worker.models.comfyui.cases import sizes
from worker.models.comfyui.cases.draw import (
    FLOW,
    PROMPT,
    SMALL,
    SMALL_VIDEO,
    STILL,
    THOUSANDS,
    VIDEO,
    Case,
    Draw,
)
from worker.models.comfyui.cases.sizes import CHANNELS, POOLED, TEXT


def _flux(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, *STILL), d.time(), d.prompt(), d(POOLED)), {"guidance": d.time(3.5), **more}


def _flux_kontext(d: Draw) -> Any:
    tokens = PROMPT + 35 + 15
    mask = (-1e4 * torch.ones(tokens, tokens).triu(1)).unsqueeze(0)  # added to the scores
    return _flux(d, ref_latents=[d(CHANNELS, 6, 10)], attention_mask=mask)


def _flux2(d: Draw) -> Any:
    given = {"guidance": d.time(3.5), "ref_latents": [d(128, 3, 5)]}
    return (d(128, *SMALL), d.time(), d.prompt()), given


def _chroma(d: Draw, channels: int = CHANNELS, **more: Any) -> Any:
    return (d(channels, *STILL), d.time(), d.prompt(), d.time(0.0)), more


def _sd3(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, *STILL), d.time(), d.prompt(), d(POOLED)), more


def _image(d: Draw, time: float = FLOW, width: int = TEXT, channels: int = CHANNELS) -> Any:
    return (d(channels, *STILL), d.time(time), d.prompt(width)), {}


def _hunyuan_dit(d: Draw, **more: Any) -> Any:
    given = {
        "text_embedding_mask": torch.ones(d.batch, 7),
        "encoder_hidden_states_t5": d(9, 48),
        "text_embedding_mask_t5": torch.ones(d.batch, 9),
        **more,
    }
    return (d(4, *STILL), d.time(THOUSANDS), d(7, TEXT)), given


def _mochi(d: Draw) -> Any:
    whole = torch.ones(d.batch, PROMPT, dtype=torch.bool)
    return (d(12, *VIDEO), d.time(), d.prompt(), whole), {"num_tokens": 9}


def _ltxv(d: Draw, per_token: bool = False) -> Any:
    time, mask = (d(105).sigmoid(), None) if per_token else (d.time(), d.mask())
    return (d(CHANNELS, *SMALL_VIDEO), time, d.prompt(), mask), {}


def _ltxav(d: Draw, per_token: bool = False, shared: bool = True) -> Any:
    """`shared`: its rows have one noise mask."""
    times = tuple(d(n).sigmoid() for n in (105, 9))
    if shared:
        times = tuple(time[:1].expand_as(time) for time in times)
    latents = [d(CHANNELS, *SMALL_VIDEO), d(8, 9, 16)]
    return (latents, times if per_token else d.time(), d.prompt(2 * TEXT)), {}


def _hunyuan_video(d: Draw, **more: Any) -> Any:
    first = (d(CHANNELS, *VIDEO), d.time(THOUSANDS), d.prompt(), d(POOLED))
    return first, {"guidance": d.time(6.0), **more}


def _hunyuan_video_masked(d: Draw, **more: Any) -> Any:
    return _hunyuan_video(d, attention_mask=d.mask()[:1], **more)


def _hunyuan_video_15(d: Draw) -> Any:
    first = (d(CHANNELS, *SMALL_VIDEO), d.time(THOUSANDS), d.prompt())
    return first, {"txt_byt5": d(5, 1472), "clip_fea": d(7, 20)}


def _hunyuan_image(d: Draw) -> Any:
    first = (d(CHANNELS, *SMALL), d.time(THOUSANDS), d.prompt())
    return first, {"txt_byt5": d(5, 1472), "guidance": d.time(3.5)}


def _video(d: Draw, time: float = FLOW, channels: int = CHANNELS, **more: Any) -> Any:
    return (d(channels, *VIDEO), d.time(time), d.prompt()), more


def _frames(d: Draw) -> Any:
    return (d(CHANNELS, *VIDEO), d(3).sigmoid(), d.prompt()), {}


def _lumina(d: Draw) -> Any:
    return (d(CHANNELS, *STILL), d.time(), d.prompt(), PROMPT), {}


def _wan(d: Draw, channels: int = CHANNELS, **more: Any) -> Any:
    return _video(d, THOUSANDS, channels, **more)


def _wan_frames(d: Draw) -> Any:
    return (d(CHANNELS, *VIDEO), torch.tensor([[0.0, 500.0, 500.0]] * d.batch), d.prompt()), {}


def _wan_s2v(d: Draw, **more: Any) -> Any:
    return _wan(d, audio_embed=d(25, 32, 12), reference_latent=d(CHANNELS, 1, *STILL), **more)


def _wan_animate(d: Draw) -> Any:
    given = {"pose_latents": d(CHANNELS, 2, *STILL), "face_pixel_values": d(3, 1, 512, 512)}
    return _wan(d, 36, clip_fea=d(257, 1280), **given)


def _qwen(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, 1, *STILL), d.time(), d.prompt()), more


def _hidream(d: Draw) -> Any:
    first = (d(CHANNELS, *STILL), d.time(THOUSANDS), d(POOLED), d(7, TEXT))
    return first, {"encoder_hidden_states_llama3": d(4, 5, 48)}


def _omnigen2(d: Draw) -> Any:
    return (d(CHANNELS, *STILL), d.time(), d.prompt(), PROMPT), {"ref_latents": [d(CHANNELS, 6, 10)]}


def _kandinsky5(d: Draw, size: tuple[int, ...]) -> Any:
    return (d(CHANNELS, *size), d.time(THOUSANDS), d.prompt(), d(POOLED)), {}


def _hunyuan3d(d: Draw) -> Any:
    return (d(CHANNELS, 35), d.time(), d.prompt()), {}


def _stable_audio(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, 35), d.time(), d(PROMPT, 64)), {"global_embed": d(POOLED), **more}


_FLUX, _WAN, _HUNYUAN = (
    ("flux.model", "Flux"),
    ("wan.model", "WanModel"),
    ("hunyuan_video.model", "HunyuanVideo"),
)
_MMDIT = ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper")
_PIXART, _DIT3D = ("pixart.pixartms", "PixArtMS"), ("hunyuan3dv2_1.hunyuandit", "HunYuanDiTPlain")
_LTXV, _LTXAV = ("lightricks.model", "LTXVModel"), ("lightricks.av_model", "LTXAVModel")
_COSMOS, _LUMINA = ("cosmos.predict2", "MiniTrainDIT"), ("lumina.model", "NextDiT")
_CHROMA, _HYDIT = ("chroma.model", "Chroma"), ("hydit.models", "HunYuanDiT")
_QWEN = ("qwen_image.model", "QwenImageTransformer2DModel")

_AUDIO = ("audio.dit", "AudioDiffusionTransformer")

CASES: dict[str, Case] = {
    "flux": Case(*_FLUX, sizes.FLUX, _flux),
    "flux controlnet": Case(*_FLUX, sizes.FLUX, lambda d: _flux(d, control=d.residuals(2, 2))),
    "flux mask, kontext": Case(*_FLUX, sizes.FLUX, _flux_kontext, causal=True),
    "flux2": Case(*_FLUX, sizes.FLUX2, _flux2),
    "chroma": Case(*_CHROMA, sizes.CHROMA, _chroma),
    "chroma controlnet": Case(*_CHROMA, sizes.CHROMA, lambda d: _chroma(d, control=d.residuals(2, 2))),
    "chroma radiance": Case(
        "chroma_radiance.model", "ChromaRadiance", sizes.RADIANCE, partial(_chroma, channels=3)
    ),
    "sd3": Case(*_MMDIT, sizes.SD3, _sd3),
    "sd3 controlnet": Case(*_MMDIT, sizes.SD3, lambda d: _sd3(d, control=d.residuals(0, 3, 35, 128))),
    "sd3.5 medium": Case(*_MMDIT, sizes.SD35, _sd3),
    "auraflow": Case("aura.mmdit", "MMDiT", sizes.AURA, partial(_image, width=sizes.AURA_TEXT, channels=4)),
    "pixart": Case(*_PIXART, sizes.PIXART, lambda d: ((d(4, 34, 38), d.time(THOUSANDS), d.prompt()), {})),
    "pixart micro": Case(
        *_PIXART,
        sizes.PIXART | {"micro_condition": True},
        lambda d: ((d(4, 34, 38), d.time(THOUSANDS), d.prompt()), {}),
    ),
    "hunyuan dit": Case(*_HYDIT, sizes.HUNYUAN_DIT, _hunyuan_dit),
    "hunyuan dit controlnet": Case(
        *_HYDIT, sizes.HUNYUAN_DIT, lambda d: _hunyuan_dit(d, control={"output": [d(35, 64)]})
    ),
    "mochi": Case("genmo.joint_model.asymm_models_joint", "AsymmDiTJoint", sizes.MOCHI, _mochi),
    "ltxv": Case(*_LTXV, sizes.LTXV, _ltxv),
    "ltxv timesteps": Case(*_LTXV, sizes.LTXV, partial(_ltxv, per_token=True)),
    "ltxav": Case(*_LTXAV, sizes.LTXAV, _ltxav),
    "ltxav timesteps": Case(*_LTXAV, sizes.LTXAV, partial(_ltxav, per_token=True)),
    "ltxav rows": Case(*_LTXAV, sizes.LTXAV, partial(_ltxav, per_token=True, shared=False), batches=(2,)),
    "hunyuan video": Case(*_HUNYUAN, sizes.HUNYUAN_VIDEO, _hunyuan_video_masked),
    "hunyuan video controlnet": Case(
        *_HUNYUAN,
        sizes.HUNYUAN_VIDEO,
        lambda d: _hunyuan_video_masked(d, control=d.residuals(2, 2, 105)),
    ),
    "hunyuan video i2v": Case(
        *_HUNYUAN,
        sizes.HUNYUAN_VIDEO,
        lambda d: _hunyuan_video(d, guiding_frame_index=d.time(0.0)),
        batches=(1,),
    ),
    "hunyuan video ref": Case(
        *_HUNYUAN,
        sizes.HUNYUAN_VIDEO,
        lambda d: _hunyuan_video(d, ref_latent=d(CHANNELS, 1, *STILL)),
        batches=(1,),
    ),
    "hunyuan video 1.5": Case(*_HUNYUAN, sizes.HUNYUAN_VIDEO_15, _hunyuan_video_15),
    "hunyuan image 2.1": Case(*_HUNYUAN, sizes.HUNYUAN_IMAGE, _hunyuan_image),
    "hunyuan image distilled": Case(*_HUNYUAN, sizes.HUNYUAN_IMAGE | {"meanflow": True}, _hunyuan_image),
    "cosmos": Case("cosmos.model", "GeneralDIT", sizes.COSMOS1, _video),
    "cosmos predict2": Case(*_COSMOS, sizes.COSMOS2, _video),
    "cosmos predict2 frames": Case(*_COSMOS, sizes.COSMOS2, _frames),
    "lumina 2": Case(*_LUMINA, sizes.LUMINA, _lumina),
    "z-image": Case(*_LUMINA, sizes.Z_IMAGE, _lumina),
    "wan t2v": Case(*_WAN, sizes.WAN, _wan),
    "wan i2v": Case(
        *_WAN,
        sizes.WAN | {"model_type": "i2v", "in_dim": 36},
        lambda d: _wan(d, 36, clip_fea=d(257, 1280)),
    ),
    "wan 2.2 ti2v": Case(*_WAN, sizes.WAN, _wan_frames),
    "wan ref_conv": Case(
        *_WAN,
        sizes.WAN | {"in_dim_ref_conv": CHANNELS},
        lambda d: _wan(d, reference_latent=d(CHANNELS, *STILL)),
    ),
    "wan vace": Case(
        "wan.model",
        "VaceWanModel",
        sizes.WAN | {"num_layers": 4, "vace_layers": 2, "vace_in_dim": 32},
        lambda d: _wan(d, vace_context=d(2, 32, *VIDEO), vace_strength=[1.0, 0.5]),
    ),
    "wan camera": Case(
        "wan.model",
        "CameraWanModel",
        sizes.WAN | {"in_dim": 32},
        lambda d: _wan(d, 32, camera_conditions=d(24, 3, 80, 112)),
    ),
    "wan s2v": Case(
        "wan.model", "WanModel_S2V", sizes.WAN_AUDIO, lambda d: _wan_s2v(d, control_video=d(CHANNELS, *VIDEO))
    ),
    "wan s2v motion": Case(
        "wan.model",
        "WanModel_S2V",
        sizes.WAN_AUDIO,
        lambda d: _wan_s2v(d, reference_motion=d(CHANNELS, 19, *STILL)),
    ),
    "wan humo": Case(
        "wan.model",
        "HumoWanModel",
        sizes.WAN,
        lambda d: _wan(d, audio_embed=d(3, 8, 5, 1280), reference_latent=d(CHANNELS, 1, *STILL)),
    ),
    "wan animate": Case(
        "wan.model_animate", "AnimateWanModel", sizes.WAN | {"num_layers": 5, "in_dim": 36}, _wan_animate
    ),
    "qwen image": Case(*_QWEN, sizes.QWEN, _qwen),
    "qwen image controlnet": Case(*_QWEN, sizes.QWEN, lambda d: _qwen(d, control=d.residuals(2, 0))),
    "qwen edit": Case(
        *_QWEN,
        sizes.QWEN,
        lambda d: _qwen(d, ref_latents=[d(CHANNELS, 1, 6, 10)], attention_mask=torch.ones(d.batch, PROMPT)),
    ),
    "qwen edit 2511": Case(
        *_QWEN,
        sizes.QWEN,
        lambda d: _qwen(d, ref_latents=[d(CHANNELS, 1, 6, 10)], ref_latents_method="index_timestep_zero"),
    ),
    "hidream": Case("hidream.model", "HiDreamImageTransformer2DModel", sizes.HIDREAM, _hidream),
    "omnigen2": Case("omnigen.omnigen2", "OmniGen2Transformer2DModel", sizes.OMNIGEN2, _omnigen2),
    "kandinsky5 video": Case(
        "kandinsky5.model", "Kandinsky5", sizes.KANDINSKY5, partial(_kandinsky5, size=VIDEO)
    ),
    "kandinsky5 image": Case(
        "kandinsky5.model", "Kandinsky5", sizes.KANDINSKY5, partial(_kandinsky5, size=STILL)
    ),
    "hunyuan3d 2": Case("hunyuan3d.model", "Hunyuan3Dv2", sizes.HUNYUAN3D2, _hunyuan3d),
    "hunyuan3d 2.1": Case(*_DIT3D, sizes.HUNYUAN3D21, _hunyuan3d, batches=(2,)),
    "stable audio": Case(*_AUDIO, sizes.STABLE_AUDIO, _stable_audio),
    "stable audio inpaint": Case(
        *_AUDIO,
        sizes.STABLE_AUDIO | {"local_add_cond_dim": 5},
        lambda d: _stable_audio(d, local_add_cond=d(5, 35)),
    ),
    "stable audio 3": Case(*_AUDIO, sizes.STABLE_AUDIO3, lambda d: _stable_audio(d, local_add_cond=d(5, 35))),
}
