"""Plans of ComfyUI's classes that draw sound, shapes in space and pixels and came after 0.8.0."""

from __future__ import annotations

from worker.parallel import Attend, Blocks, Carrier, Named, Plan, Prefix, Region, Tokens, Voxels

OPTIONS = "transformer_options"
IMAGE, TEXT = Tokens("image"), Tokens("text")


def _same(names: str) -> frozenset[str]:
    return frozenset(f"{names} {OPTIONS}".split())


# Tokens are moments of sound: linear attention, and a convolution over three of them.
ACE = Region(
    {"transformer_blocks": Blocks({"hidden_states": IMAGE}, ("image",))},
    {"transformer_blocks.*.attn": Attend("image", linear=True)},
    {"rotary_freqs_cis": Tokens("image", 0), "attention_mask": IMAGE},
    _same("encoder_hidden_states encoder_attention_mask rotary_freqs_cis_cross temb"),
    "image",
    halo=("ff.depth_conv.conv",),
)

# Every second layer sees so many tokens around one.
ACE15 = Region(
    {"decoder.layers": Blocks({"hidden_states": IMAGE}, ("image",))},
    {"decoder.layers.*.self_attn": Attend("image", window="sliding_window")},
    {"position_embeddings": Tokens("image", 0)},
    _same("temb encoder_hidden_states attention_mask encoder_attention_mask"),
    "image",
)

# It draws a long piece in windows, one call of these layers after another.
MUSIC = Region(
    {"diffusion_transformer.transformer.layers": Blocks({"x": IMAGE}, ("image",))},
    {"diffusion_transformer.transformer.layers.*.self_attn": Attend("image")},
    {"rotation_matrix": Tokens("image", 2)},
    gather="image",
)


def _pixeldit(each: bool = False) -> Plan:
    """Blocks of patches, then blocks of pixels, which join rows of the batch with those of the picture, and
    so have their tokens spread in their attention only.

    Args:
        each: between blocks something of all tokens is added.
    """
    patches = Region(
        {"patch_blocks": Blocks({"x": IMAGE, "y": TEXT}, ("image", "text"))},
        {"patch_blocks.*.attn": Attend("text image")},
        {"pos_img": Tokens("image", 0), "pos_txt": Tokens("text", 0)},
        _same("c attn_mask"),
        "image text" if each else "image",
        each=each,
    )
    pixels = Region(
        {"pixel_blocks.*.attn": Blocks({"x": IMAGE}, ("image",))},
        {"pixel_blocks.*.attn": Attend("image")},
        {"pos": Tokens("image", 0)},
        _same("mask"),
        "image",
        each=True,
    )
    return Plan((patches, pixels))


def _triposplat(blocks: str) -> Region:
    """Angles are made of the tokens between blocks: of all of them only before the first."""
    return Region(
        {blocks: Blocks({"x": IMAGE, "rotary_emb": IMAGE}, ("image",))},
        {f"{blocks}.*.attn": Attend("image")},
        same=_same("mod"),
        gather="image",
    )


# A language model's layers: a prompt that is causal, and an image that sees it and itself.
HIDREAM_O1 = Region(
    {"language_model.layers": Blocks({"x": Tokens("* image")}, ("* image", None))},
    {"language_model.layers.*.self_attn": Attend("image", "* image", causal=True)},
    {"freqs_cis": Tokens("* image", -2)},
    _same("attention_mask optimized_attention past_key_value"),
    "image",
    prefix=Prefix("ar_len", "past_key_value"),
)


def _trellis(model: str, voxels: Carrier) -> Region:
    """One of the models in it. Features of a picture, where there are any, lie along voxels."""
    return Region(
        {f"{model}.blocks": Blocks({"x": voxels}, (voxels,))},
        {f"{model}.blocks.*.self_attn": Attend("image")},
        {"phases": Tokens("image", 0), "context": Named({"proj": voxels})},
        _same("mod"),
        "image",
        optional=True,
    )


TRELLIS = (
    _trellis("structure_model", IMAGE),  # a dense grid
    *(_trellis(model, Voxels("image")) for model in ("img2shape", "img2shape_512", "shape2txt")),
)

PLANS: dict[str, Plan | tuple[Plan, ...]] = {
    "AceStepConditionGenerationModel": Plan((ACE15,)),
    "ACEStepTransformer2DModel": Plan((ACE,)),
    "HiDreamO1Transformer": Plan((HIDREAM_O1,)),
    "LatentSeqMMFlowModel": Plan((_triposplat("noise_refiner"), _triposplat("blocks"))),
    "MiniMaxMusic3DiT": Plan((MUSIC,)),
    "PidNet": _pixeldit(each=True),
    "PixDiT_T2I": _pixeldit(),
    "Trellis2": Plan(TRELLIS),
}
REASONS: dict[str, str] = {}  # class -> why it has none
