"""The plans of ComfyUI's own transformer classes, by their names (ComfyUI 0.3.64 to 0.33.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from worker.models.plans import comfyui_image, comfyui_other, comfyui_video
from worker.parallel import (
    Attend,
    Blocks,
    Carrier,
    Compressed,
    Count,
    Frames,
    Grid,
    GroupedMask,
    Plan,
    Region,
    Spans,
    Tokens,
)


def _mirrored(block: int, blocks: int) -> int | None:
    """The block whose output another one reads, counted from the end as that from the beginning."""
    return blocks - 1 - block if block > blocks // 2 else None


IMAGE, TEXT = Tokens("image"), Tokens("text")
OPTIONS = "transformer_options"
# LTX's cosines and sines, for all heads or for each; from 0.33 on matrices that turn.
ROTARY = {3: 1, 4: 2, 6: 1}


def _same(names: str) -> frozenset[str]:
    return frozenset(f"{names} {OPTIONS}".split())


def _flux(order: str, at: str) -> Plan:
    """Blocks that keep image and text apart, then blocks that join them in `order`."""
    tables: Mapping[str, Carrier] = {
        "pe": Tokens(order, 2),
        "modulation_dims_img": Spans("image"),
        "modulation_dims_txt": Spans("text"),
        "modulation_dims": Spans(order),
    }
    return Plan(
        (
            Region(
                {
                    "double_blocks": Blocks({"img": IMAGE, "txt": TEXT}, ("image", "text")),
                    "single_blocks": Blocks(returns=(order,), carries={"x": order}),
                },
                {"double_blocks.*": Attend(order), "single_blocks.*": Attend(order)},
                tables,
                _same("vec attn_mask"),
                "image",
                at,
                control={
                    "input": ("double_blocks", "image"),
                    "output": ("single_blocks", "image" if order.startswith("text") else order),
                },
            ),
        )
    )


def _one(
    blocks: str,
    stream: str,
    attention: str,
    same: str,
    tables: Mapping[str, Carrier] | None = None,
    at: str = "",
    carries: Mapping[str, str] | None = None,
) -> Region:
    """One list of blocks over one sequence of tokens."""
    return Region(
        {blocks: Blocks({stream: IMAGE}, ("image",), carries or {})},
        {f"{blocks}.*.{attention}": Attend("image")},
        tables or {},
        _same(same),
        "image",
        at,
    )


QWEN = Plan(
    (
        Region(
            {
                "transformer_blocks": Blocks(
                    {"hidden_states": IMAGE, "encoder_hidden_states": TEXT}, ("text", "image")
                )
            },
            {"transformer_blocks.*.attn": Attend("text image")},
            {
                "image_rotary_emb": Tokens("text image", (2, 1)),
                "timestep_zero_index": Count("image"),
                "encoder_hidden_states_mask": Tokens("text", ndim=2, masks_keys=True, added=True),
            },
            _same("temb"),
            "image",
            "norm_out",
            control={"input": ("transformer_blocks", "image")},
        ),
    )
)
SD3 = Plan(
    (
        Region(
            {
                "joint_blocks": Blocks(
                    {"context": TEXT, "x": IMAGE}, ("text", "image"), names=("context", "x")
                )
            },
            # The second: SD3.5 medium's image tokens among themselves.
            {"joint_blocks.*": (Attend("text image"), Attend("image"))},
            {},
            _same("c use_checkpoint"),
            "image",
            "final_layer",
            control={"output": ("joint_blocks", "image")},
        ),
    )
)
AURA = Plan(
    (
        Region(
            {
                "double_layers": Blocks({"c": TEXT, "x": IMAGE}, ("text", "image")),
                "single_layers": Blocks(returns=("text image",), carries={"cx": "text image"}),
            },
            {
                "double_layers.*.attn": Attend("text image"),
                "single_layers.*.attn": Attend("text image"),
            },
            {},
            _same("global_cond"),
            "image",
        ),
    )
)
HUNYUAN_DIT = replace(
    _one(
        "blocks", "x", "attn1", "c text_states", {"freq_cis_img": Tokens("image", 0)}, "final_layer",
        {"skip": "image"},
    ),
    control={"output": ("", "image")},
)  # fmt: skip
MOCHI = Region(
    {"blocks": Blocks({"x": IMAGE}, ("image", "*"))},
    {"blocks.*.attn": Attend("image *")},
    {"rope_cos": Tokens("image", 0), "rope_sin": Tokens("image", 0)},
    _same("c y crop_y"),
    "image",
)


def _guides(stream: str) -> GroupedMask:
    """How much a video sees of pictures behind it."""
    return GroupedMask(stream, "guide_start", "tracked_count", "noisy_mask", "tracked_mask")


UNGUIDED = "stg_skip_self_attn"  # of calls whose self-attention passes values through
LTXV = replace(
    _one(
        "transformer_blocks", "x", "attn1", "context attention_mask prompt_timestep",
        {"timestep": IMAGE, "pe": Tokens("image", ROTARY), "self_attention_mask": _guides("image")},
    ),
    attention={"transformer_blocks.*.attn1": Attend("image", unless=UNGUIDED)},
)  # fmt: skip


def _ltxav() -> Region:
    video, audio = Tokens("video"), Tokens("audio")
    names = ("timestep", "cross_scale_shift_timestep", "cross_gate_timestep")
    # From 0.33 on the video's are kept once for each frame.
    kept = {"data": "data", "entries": "num_frames", "every": "patches_per_frame"}
    tables: dict[str, Carrier] = {
        f"{s[0]}_{name}": Compressed(s, **kept) for s in ("video", "audio") for name in names
    }
    tables |= {f"{s[0]}_{name}": Tokens(s, ROTARY) for s in ("video", "audio") for name in ("pe", "cross_pe")}
    attention = {
        "attn1": Attend("video", unless=UNGUIDED),
        "audio_attn1": Attend("audio", unless=UNGUIDED),
        "audio_to_video_attn": Attend("video", "audio"),
        "video_to_audio_attn": Attend("audio", "video"),
    }
    return Region(
        {"transformer_blocks": Blocks({"x": (video, audio)}, ("video", "audio"))},
        {f"transformer_blocks.*.{name}": attend for name, attend in attention.items()},
        tables | {"self_attention_mask": _guides("video")},
        _same("v_context a_context attention_mask v_prompt_timestep a_prompt_timestep"),
        "video audio",
    )


def _joint(blocks: str, stream: str, freqs: str, attention: str, same: str) -> Region:
    """A list of several that run over one sequence of text and image, whole before and after."""
    return _one(blocks, stream, attention, same, {freqs: IMAGE})


LUMINA = Plan(
    tuple(
        replace(
            _joint(blocks, "x", "freqs_cis", "attention", "adaln_input x_mask"),
            tables={"freqs_cis": IMAGE, "timestep_zero_index": Spans("image")},
        )
        for blocks in ("noise_refiner", "layers")
    )
)
OMNIGEN2 = Plan(
    tuple(
        _joint(blocks, "hidden_states", "image_rotary_emb", "attn", "temb attention_mask")
        for blocks in ("noise_refiner", "ref_image_refiner", "layers")
    )
)
# Its loop adds a table of all tokens between blocks: they are cut and gathered in every block.
COSMOS1 = Region(
    {"blocks": Blocks({"x": Grid("image", 0, 2)}, (Grid("image", 0, 2),))},
    {"blocks.*.blocks.0.block": Attend("image")},
    {"rope_emb_L_1_1_D": Tokens("image", 0)},
    _same("emb_B_D crossattn_emb crossattn_mask adaln_lora_B_3D"),
    "image",
    each=True,
)
COSMOS2 = Region(
    {"blocks": Blocks({"x_B_T_H_W_D": Grid("image", 1, 3)}, (Grid("image", 1, 3),))},
    {"blocks.*.self_attn": Attend("image")},
    {
        "rope_emb_L_1_1_D": IMAGE,
        "emb_B_T_D": Frames("image", 3),
        "adaln_lora_B_T_3D": Frames("image", 3),
        "extra_per_block_pos_emb": Grid("image", 1, 3),
    },
    _same("crossattn_emb"),
    "image",
)
# Text tokens are joined anew in every block: every rank has them whole.
HIDREAM = Region(
    {
        "double_stream_blocks": Blocks({"image_tokens": IMAGE}, ("image", "*")),
        "single_stream_blocks": Blocks(returns=("image *",), carries={"image_tokens": "image *"}),
    },
    {
        "double_stream_blocks.*.block.attn1": Attend("image *"),
        "single_stream_blocks.*.block.attn1": Attend("image *"),
    },
    {"rope": Tokens("image *", 1)},
    _same("image_tokens_masks text_tokens adaln_input"),
    "image",
    "final_layer",
)
KANDINSKY5 = _one(
    "visual_transformer_blocks", "visual_embed", "self_attention", "text_embed time_embed", {"freqs": IMAGE}
)
HUNYUAN3D21 = _one(
    "blocks", "hidden_states", "attn1", "conditioning text_states", carries={"skip_tensor": "image"}
)
STABLE_AUDIO = _one(
    "transformer.layers", "x", "self_attn", "context global_cond mask context_mask",
    {"rotary_pos_emb": Tokens("image", 0), "local_add_cond": Tokens("image", last=True)},
)  # fmt: skip

FLUX, RADIANCE = (
    _flux("text image", "final_layer"),
    _flux("text image", ""),
)  # a head that is no layer of tokens
# It drops the tokens of a reference before its last layer.
HUNYUAN_VIDEO, HUNYUAN_VIDEO_TEXT_FIRST = _flux("image text", ""), _flux("text image", "")

# Of a class whose versions differ, several: the first that is proven on the ComfyUI at hand is taken.
PLANS: dict[str, Plan | tuple[Plan, ...]] = {
    "AsymmDiTJoint": Plan((MOCHI,)),
    "AudioDiffusionTransformer": Plan((STABLE_AUDIO,)),
    "Chroma": FLUX,
    "ChromaRadiance": RADIANCE,
    "Flux": FLUX,
    "GeneralDIT": Plan((COSMOS1,)),
    "HiDreamImageTransformer2DModel": Plan((HIDREAM,)),
    "HunYuanDiT": Plan((HUNYUAN_DIT,), skips=_mirrored),
    "HunYuanDiTPlain": Plan((HUNYUAN3D21,), skips=_mirrored),
    "Hunyuan3Dv2": FLUX,
    "HunyuanVideo": (HUNYUAN_VIDEO, HUNYUAN_VIDEO_TEXT_FIRST),
    "Kandinsky5": Plan((KANDINSKY5,)),
    "LTXAVModel": Plan((_ltxav(),)),
    "LTXVModel": Plan((LTXV,)),
    "MMDiT": AURA,
    "MageFlowTransformer2DModel": QWEN,
    "MiniTrainDIT": Plan((COSMOS2,)),
    "Anima": Plan((COSMOS2,)),  # the same, behind an adapter of its prompts
    "NextDiT": LUMINA,
    "NextDiTPixelSpace": LUMINA,
    "OmniGen2Transformer2DModel": OMNIGEN2,
    "OpenAISignatureMMDITWrapper": SD3,
    "PixArtMS": Plan((_one("blocks", "x", "attn", "y t mask HW"),)),
    "QwenImageTransformer2DModel": QWEN,
    **comfyui_image.PLANS,
    **comfyui_video.PLANS,
    **comfyui_other.PLANS,
}
# Why Ulysses and Ring do not spread a class, where that is not for want of a plan.
REASONS: dict[str, str] = {
    "UNetModel": "it is a U-Net, which has no tokens: its convolutions see the whole picture",
    **comfyui_image.REASONS,
    **comfyui_video.REASONS,
    **comfyui_other.REASONS,
}
