"""The plans of diffusers' transformer classes, by their names (diffusers 0.36 to 0.42)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worker.parallel import Attend, Blocks, Count, Plan, Region, Tokens

IMAGE, TEXT = Tokens("image"), Tokens("text")
JOINT = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT}
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
KWARGS = "joint_attention_kwargs"


def _plan(
    blocks: str,
    cut: Mapping[str, Tokens],
    returns: tuple[str | None, ...],
    attention: Mapping[str, Attend],
    same: str,
    **rest: Any,
) -> Plan:
    """One list of blocks, whose attentions are named within a block."""
    attention = {f"{blocks}.*.{name}": attend for name, attend in attention.items()}
    region = Region({blocks: Blocks(cut, returns)}, attention, same=frozenset(same.split()), **rest)
    return Plan((region,), patched="image")


def _double_single(
    order: str,
    tables: Mapping[str, Tokens],
    same: str,
    single: Blocks,
    gather: str,
    returns: tuple[str | None, ...],
    names: tuple[str, ...] = (),
    at: str = "",
) -> Plan:
    """Blocks that keep text and image apart, then blocks that join them, or keep them so."""
    attend = Attend(order)
    blocks = {DOUBLE: Blocks(JOINT, returns, names=names), SINGLE: single}
    attention = {f"{DOUBLE}.*.attn": attend, f"{SINGLE}.*.attn": attend}
    region = Region(blocks, attention, tables, frozenset(same.split()), gather, at)
    return Plan((region,), patched="image")


def _kept_apart(plan: Plan) -> Plan:
    """Of a ControlNet with these blocks: what they compute is wanted where it is."""
    return Plan(tuple(replace(region, gather="", at="") for region in plan.regions))


_CARRIED = {"hidden_states": "image", "encoder_hidden_states": "text"}
_ROTARY = {"image_rotary_emb": Tokens("text image", 0)}
_SELF = {"attn1": Attend("image")}
_BASIC = (
    "attention_mask encoder_hidden_states encoder_attention_mask timestep cross_attention_kwargs "
    "class_labels added_cond_kwargs"
)


def _hunyuan(rotary: str) -> tuple[str, ...]:
    """Its blocks without token replacement are called with its arguments, too, and take them as `*args`."""
    first = (*JOINT, "temb", "attention_mask")
    return (*first, rotary, "token_replace_emb", "num_tokens")


FLUX = _double_single(
    "text image", _ROTARY, f"temb {KWARGS}",
    Blocks(carries=_CARRIED, returns=("text", "image")), "image", ("text", "image"), at="norm_out",
)  # fmt: skip
FLUX2 = _double_single(
    "text image", _ROTARY, f"temb_mod_img temb_mod_txt temb_mod split_hidden_states text_seq_len {KWARGS}",
    Blocks(carries={"hidden_states": "text image", "encoder_hidden_states": ""}, returns=("text image",)),
    "text image", ("text", "image"),
)  # fmt: skip
HUNYUAN_VIDEO = _double_single(
    "image text",
    {
        "freqs_cis": Tokens("image", 0),
        "image_rotary_emb": Tokens("image", 0),
        "num_tokens": Count("image"),
    },
    "temb attention_mask token_replace_emb",
    Blocks(carries=_CARRIED, returns=("image", "text"), names=_hunyuan("image_rotary_emb")), "image",
    ("image", "text"), _hunyuan("freqs_cis"),
)  # fmt: skip
SD3 = _plan(
    DOUBLE, JOINT, ("text", "image"), {"attn": Attend("image text"), "attn2": Attend("image", optional=True)},
    f"temb {KWARGS}", gather="image", at="norm_out",
)  # fmt: skip
WAN = _plan(
    "blocks", {"hidden_states": IMAGE}, ("image",), _SELF, "encoder_hidden_states", gather="image",
    tables={"rotary_emb": IMAGE, "temb": Tokens("image", ndim=4)},
)  # fmt: skip
QWEN_IMAGE = _plan(
    DOUBLE, JOINT, ("text", "image"), {"attn": Attend("text image")}, f"temb {KWARGS}", gather="image",
    tables={
        "image_rotary_emb": (Tokens("image", 0), Tokens("text", 0)),
        "modulate_index": IMAGE,
        "encoder_hidden_states_mask": Tokens("text", masks_keys=True),
    },
)  # fmt: skip
HUNYUAN_VIDEO_15 = _plan(
    DOUBLE, JOINT, ("image", "text"), {"attn": Attend("image text")}, "temb", gather="image",
    tables={"freqs_cis": Tokens("image", 0), "attention_mask": Tokens("text", masks_keys=True)},
)  # fmt: skip
COGVIDEOX = _plan(
    DOUBLE, JOINT, ("image", "text"), {"attn1": Attend("text image")}, "temb attention_kwargs",
    tables={"image_rotary_emb": Tokens("image", 0)}, gather="image text",
)  # fmt: skip
MOCHI = _plan(
    DOUBLE, JOINT, ("image", "text"), {"attn1": Attend("image text", counted=True)}, "temb", gather="image",
    tables={"image_rotary_emb": Tokens("image", 0), "encoder_attention_mask": TEXT},
)  # fmt: skip
PIXART = _plan(DOUBLE, {"hidden_states": IMAGE}, ("image",), _SELF, _BASIC, gather="image")
HUNYUAN_DIT = Plan(
    (
        Region(
            {"blocks": Blocks({"hidden_states": IMAGE}, ("image",), {"skip": "image"})},
            {"blocks.*.attn1": Attend("image")},
            {"image_rotary_emb": Tokens("image", 0)},
            frozenset({"encoder_hidden_states", "temb"}),
            gather="image",
        ),
    ),
    patched="image",
    skips=lambda i, n: n - 1 - i if i > n // 2 else None,
)


def _rows(blocks: str, rows: str) -> Region:
    """Latte: each kind of block attends within the rows of its batch, which are what is split."""
    row = Tokens(rows, 0)
    same = frozenset(_BASIC.split()) - {"encoder_hidden_states", "timestep"}
    plan = Blocks({"hidden_states": row}, (row,))
    return Region({blocks: plan}, {}, {"encoder_hidden_states": row, "timestep": row}, same, rows, each=True)


LATTE = Plan((_rows(DOUBLE, "frames"), _rows("temporal_transformer_blocks", "places")))


def _z_image(blocks: str) -> Region:
    return Region(
        {blocks: Blocks({"x": IMAGE}, ("image",))},
        {f"{blocks}.*.attention": Attend("image")},
        {"freqs_cis": IMAGE, "noise_mask": IMAGE},
        frozenset({"attn_mask", "adaln_input", "adaln_noisy", "adaln_clean"}),
        gather="image",
    )


Z_IMAGE = Plan((_z_image("noise_refiner"), _z_image("layers")))


def _ltx2() -> Plan:
    video, audio = ("", "_ca_scale_shift", "_ca_gate"), ("_audio", "_ca_audio_scale_shift", "_ca_audio_gate")
    tables = {f"temb{name}": Tokens(s) for s, names in (("video", video), ("audio", audio)) for name in names}
    tables |= {f"{ca}{s}_rotary_emb": Tokens(s, -2) for s in ("video", "audio") for ca in ("", "ca_")}
    attention = {
        "attn1": Attend("video"),
        "audio_to_video_attn": Attend("video", "audio"),
        "audio_attn1": Attend("audio"),
        "video_to_audio_attn": Attend("audio", "video"),
    }
    same = (
        "encoder_hidden_states audio_encoder_hidden_states temb_prompt temb_prompt_audio "
        "encoder_attention_mask audio_encoder_attention_mask self_attention_mask audio_self_attention_mask "
        "a2v_cross_attention_mask v2a_cross_attention_mask use_a2v_cross_attention use_v2a_cross_attention "
        "perturbation_mask all_perturbed"
    )
    cut = {"hidden_states": Tokens("video"), "audio_hidden_states": Tokens("audio")}
    plan = _plan(DOUBLE, cut, ("video", "audio"), attention, same, tables=tables, gather="video audio")
    return Plan(plan.regions)


SANA = Plan(
    _plan(
        DOUBLE, {"hidden_states": IMAGE}, ("image",), {"attn1": Attend("image", linear=True)},
        "attention_mask encoder_hidden_states encoder_attention_mask timestep width", gather="image",
        tables={"height": Count("image")}, units={"image": "width"}, halo=("ff.conv_depth",),
    ).regions
)  # fmt: skip

SD3_CONTROLNET, FLUX_CONTROLNET = _kept_apart(SD3), _kept_apart(FLUX)

PLANS: dict[str, Plan] = {
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "ConsisIDTransformer3DModel": COGVIDEOX,
    "DiTTransformer2DModel": Plan(PIXART.regions),  # its forward reads the first block's norm behind the last
    "Flux2Transformer2DModel": FLUX2,
    "FluxTransformer2DModel": FLUX,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": _ltx2(),
    "LatteTransformer3DModel": LATTE,
    "MochiTransformer3DModel": Plan(MOCHI.regions),  # tokens are dropped within its attention
    "PixArtTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": SANA,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
