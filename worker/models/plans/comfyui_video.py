"""Plans of ComfyUI's classes that draw videos: Wan's, and those that came after 0.8.0."""

from __future__ import annotations

from worker.parallel import Attend, Blocks, Frames, Plan, Region, Spans, Tokens

IMAGE, TEXT = Tokens("image"), Tokens("text")
OPTIONS = "transformer_options"


def _wan(whole: str = "", at: str = "head", same: str = "", **more: Blocks) -> Plan:
    """`whole` names modules between or in the blocks that mix tokens in a way of their own."""
    blocks = {"blocks": Blocks({"x": IMAGE}, ("image",)), **more}
    return Plan(
        (
            Region(
                blocks,
                {f"{name}.*.self_attn": Attend("image") for name in blocks},
                {"freqs": IMAGE, "e": Frames("image", 4)},
                frozenset(f"context context_img_len audio {same} {OPTIONS}".split()),
                "image",
                at,
                whole={whole: {"x": "image"}} if whole else {},
            ),
        )
    )


# Its attention sees one frame of the pose with one frame of the picture, so it runs whole, with its queries
# shared out. A pose has blocks' outputs of its own.
ANIMATE2 = (
    Region(
        {"blocks:forward_pose": Blocks({"x": Tokens("pose")}, (None, None, None))},
        {"blocks.*.self_attn:forward_pose": Attend("pose")},
        {"freqs": Tokens("pose"), "e": Frames("pose", 4)},
        frozenset({"context", "context_img_len", OPTIONS}),
    ),
    Region(
        {"blocks:forward_gen": Blocks({"x": IMAGE}, ("image",), {"k_pose": "pose", "v_pose": "pose"})},
        {"blocks.*.self_attn:forward_gen": Attend("*")},
        {"e": Frames("image", 4)},
        frozenset(f"freqs f_gen hw buffers ref_strength context context_img_len {OPTIONS}".split()),
        "image",
        "head",
        whole={"blocks.*.self_attn:forward_gen": {"x": "image", "k_pose": "pose", "v_pose": "pose"}},
    ),
)
_VACE = Blocks({"c": IMAGE}, ("image", "image"), tables={"x": IMAGE})

COGVIDEOX = Region(
    {"blocks": Blocks({"hidden_states": IMAGE, "encoder_hidden_states": TEXT}, ("image", "text"))},
    {"blocks.*": Attend("text image")},
    {"image_rotary_emb": Tokens("image", 0)},
    frozenset({"temb", OPTIONS}),
    "image",
)
# Text, references, sound and video are one sequence, without a dimension of the batch.
ROWS = Tokens("image", 0)
MINIMAX_H3 = Region(
    {"blocks": Blocks({"x": ROWS}, (ROWS,))},
    {"blocks.*.attn": Attend("image")},
    {"mod_segments": Spans("image"), "rope_freqs": Tokens("image", 1)},
    frozenset({"t_emb", OPTIONS}),
    "image",
)

PLANS: dict[str, Plan | tuple[Plan, ...]] = {
    "AnimateWanModel": _wan("face_adapter.fuser_blocks.*"),
    "CameraWanModel": _wan(),
    "CausalWanModel": _wan(same="kv_cache crossattn_cache"),
    "CogVideoXTransformer3DModel": Plan((COGVIDEOX,)),
    "HumoWanModel": _wan("blocks.*.audio_cross_attn_wrapper"),
    "MiniMaxH3Model": Plan((MINIMAX_H3,)),
    "SCAIL2WanModel": _wan(),
    "SCAILWanModel": _wan(),
    "VaceWanModel": _wan(vace_blocks=_VACE),
    "WanAnimate2Model": Plan(ANIMATE2),
    "WanDancerModel": _wan("music_injector", "head head_global"),
    "WanModel": _wan(),
    "WanModel_S2V": _wan("audio_injector"),
}
REASONS: dict[str, str] = {
    "NaDiT": "SeedVR2 attends in windows that move from block to block, over tokens that it puts into an "
    "order of each, and keeps what it makes of all tokens from block to block",
}
