"""Plans of ComfyUI's classes that draw pictures and came after 0.8.0."""

from __future__ import annotations

from collections.abc import Mapping

from worker.parallel import Attend, Blocks, Carrier, Count, Plan, Region, Tokens

IMAGE, TEXT = Tokens("image"), Tokens("text")
OPTIONS = "transformer_options"


def _one(
    blocks: str, stream: str, attention: str, same: str, tables: Mapping[str, Carrier], at: str = ""
) -> Region:
    """One list of blocks over one sequence, in which the prompt's tokens are too."""
    return Region(
        {blocks: Blocks({stream: IMAGE}, ("image",))},
        {f"{blocks}.*.{attention}": Attend("image")},
        tables,
        frozenset(f"{same} {OPTIONS}".split()),
        "image",
        at,
    )


ERNIE = _one(
    "layers", "x", "self_attention", "temb attention_mask", {"rotary_pos_emb": IMAGE}, at="final_norm"
)
KREA2 = _one(
    "blocks", "x", "attn", "vec mask",
    {"freqs": Tokens("image", 2), "timestep_zero_index": Count("image")}, at="last",
)  # fmt: skip
IDEOGRAM4 = _one("layers", "x", "attention", "attn_mask adaln_input", {"freqs_cis": IMAGE}, at="final_layer")
LENS = Region(
    {
        "transformer_blocks": Blocks(
            {"hidden_states": IMAGE, "encoder_hidden_states": TEXT}, ("text", "image")
        )
    },
    {"transformer_blocks.*.attn": Attend("image text")},
    {
        "freqs_cis": Tokens("image text", 2),
        "attention_mask": Tokens("image text", 3, masks_keys=True, added=True),
    },
    frozenset({"temb", OPTIONS}),
    "image",
    "norm_out",
    control={"input": ("transformer_blocks", "image")},
)
JOYIMAGE = Region(
    {"double_blocks": Blocks({"hidden_states": IMAGE, "encoder_hidden_states": TEXT}, ("image", "text"))},
    {"double_blocks.*.attn": Attend("image text")},
    {"image_rotary_emb": IMAGE},
    frozenset({"temb", OPTIONS}),
    "image",
)


def _boogu() -> Plan:
    """References and picture are refined each by itself; then the prompt is beside them, then before them."""
    same = "temb attention_mask"
    refined = tuple(
        _one(blocks, "hidden_states", "attn", same, {"image_rotary_emb": IMAGE})
        for blocks in ("noise_refiner", "ref_image_refiner")
    )
    joined, order = Tokens("text image"), "text image"
    together = Region(
        {
            "double_stream_layers": Blocks(
                {"img_hidden_states": IMAGE, "instruct_hidden_states": TEXT},
                ("image", "text"),
                tables={"joint_rotary_emb": joined, "img_rotary_emb": IMAGE},
            ),
            "single_stream_layers": Blocks(
                returns=(order,), carries={"hidden_states": order}, tables={"image_rotary_emb": joined}
            ),
        },
        {
            "double_stream_layers.*.img_instruct_attn": Attend(order),
            "double_stream_layers.*.img_self_attn": Attend("image"),
            "single_stream_layers.*.attn": Attend(order),
        },
        same=frozenset(f"{same} joint_attention_mask img_attention_mask {OPTIONS}".split()),
        gather="image",
    )
    return Plan((*refined, together))


PLANS: dict[str, Plan | tuple[Plan, ...]] = {
    "BooguTransformer2DModel": _boogu(),
    "ErnieImageModel": Plan((ERNIE,)),
    "Ideogram4Transformer2DModel": Plan((IDEOGRAM4,)),
    "JoyImageTransformer3DModel": Plan((JOYIMAGE,)),
    "LensTransformer2DModel": Plan((LENS,)),
    "SingleStreamDiT": Plan((KREA2,)),
}
REASONS: dict[str, str] = {}  # class -> why it has none
