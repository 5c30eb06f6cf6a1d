"""VAEs on disk: diffusers folders, and single files in the original releases' naming, as ComfyUI has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import Checkpoint, Shapes, Source, read_json

PREFIXES = ("", "first_stage_model.", "vae.")  # a whole checkpoint holds the VAE under one
WEIGHTS = "diffusion_pytorch_model"  # how diffusers names the file in its folders
GROUPS = 32  # of every group norm in the original releases
ASIDE = ("num_batches_tracked",)  # counts training steps; not every file has it
OF_FRAMES = ("LattePipeline",)  # draw videos with a VAE of pictures, frame by frame

# What a file that the ranks cannot run is told by.
FOREIGN = {
    "taesd_decoder.1.weight": "TAESD, a small approximation that needs no ranks",
    "decoder.22.bias": "a TAE for videos, a small approximation that needs no ranks",
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": "an LTX video VAE in Lightricks' naming",
    "decoder.blocks.2.blocks.3.stack.5.weight": "a Mochi VAE in Genmo's naming",
    "blocks.2.blocks.3.stack.5.weight": "a Mochi VAE in Genmo's naming",
    "decoder.unpatcher3d.wavelets": "a Cosmos tokenizer",
    "decoder.layers.1.layers.0.beta": "a VAE for sound",
}


@dataclass(frozen=True)
class StoredVAE:
    """A VAE on disk: diffusers' class for it, that class's arguments, and where each tensor is.

    Args:
        of_frames: its pipeline draws videos, and the class knows pictures: every frame is one.
    """

    cls: str
    config: dict[str, Any]
    mapping: dict[str, Source]
    checkpoint: Checkpoint
    of_frames: bool = False


def find(path: Path) -> StoredVAE:
    """The VAE in a file, a diffusers VAE folder, or a pipeline folder. Reads headers only.

    A file that lies beside its config.json, as diffusers writes both, is read by that.

    Raises:
        InvalidInput: nothing there, a damaged file, or nothing the ranks run.
    """
    described = path.stem.startswith(WEIGHTS) and (path.parent / "config.json").is_file()
    if not path.is_dir() and not described:
        return _of_file(path)
    folder = path if path.is_dir() else path.parent
    index = folder / "model_index.json"
    of_frames = index.exists() and read_json(index).get("_class_name") in OF_FRAMES
    folder = folder / "vae" if index.exists() else folder
    config = read_json(folder / "config.json")
    checkpoint = Checkpoint.at(folder if path.is_dir() else path)
    mapping = {_renamed(name, _OLD): Source(name) for name in checkpoint.shapes}
    cls = str(config.get("_class_name", "model without a class name"))
    return StoredVAE(cls, config, mapping, checkpoint, of_frames)


def _of_file(path: Path) -> StoredVAE:
    checkpoint = Checkpoint.at(path)
    prefix = next((p for p in PREFIXES if _is_vae(checkpoint.shapes, p)), None)
    if prefix is None:
        raise InvalidInput(_unknown(path, checkpoint.shapes))
    keys = {key.removeprefix(prefix): key for key in checkpoint.shapes if key.startswith(prefix)}
    try:
        cls, config, names = _described({name: checkpoint.shapes[key] for name, key in keys.items()})
    except (KeyError, IndexError) as error:
        raise InvalidInput(
            f"{path.name} is a VAE that lacks {error}, or has it in a shape that none has; the file is "
            "damaged: download it again."
        ) from error
    return StoredVAE(cls, config, {n: Source(keys[original]) for n, original in names.items()}, checkpoint)


def _described(shapes: Shapes) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Of tensors in a file: diffusers' class, its arguments, and each name under diffusers' name."""
    if "decoder.middle.0.residual.0.gamma" in shapes:
        return "AutoencoderKLWan", _wan_config(shapes), {_wan_name(name): name for name in shapes}
    levels = _levels(shapes)
    names = {_ldm_name(name, levels): name for name in shapes}
    shapes = {name: shapes[original] for name, original in names.items()}
    return _ldm_class(shapes), _ldm_config(shapes), names


def _is_vae(shapes: Shapes, prefix: str) -> bool:
    marks = (
        "decoder.middle.0.residual.0.gamma",  # Wan 2.1, 2.2 and Qwen-Image
        "decoder.mid.block_1.norm1.weight",  # latent diffusion: SD3, FLUX.1, FLUX.2, HunyuanVideo
        "decoder.up_blocks.0.resnets.0.norm1.weight",  # the same in diffusers' naming
    )
    return any(prefix + mark in shapes for mark in marks)


def _unknown(path: Path, shapes: Shapes) -> str:
    for mark, words in FOREIGN.items():
        if any(prefix + mark in shapes for prefix in PREFIXES):
            return (
                f"{path.name} is {words}, which the ranks do not read from a single file; use the stock VAE "
                "loader, or put diffusers' folder of it (config.json and safetensors) into models/vae."
            )
    some = ", ".join(sorted(shapes)[:3]) or "none"
    return (
        f"{path.name} holds no VAE that the ranks know: its {len(shapes)} tensors begin with {some}; "
        "choose a VAE file of SD3, FLUX.1, FLUX.2, Wan, Qwen-Image or HunyuanVideo."
    )


_OLD = (  # diffusers' own names of old
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# ---------------------------------------------------------------------- latent diffusion's naming


def _levels(shapes: Shapes) -> int:
    """How many resolutions the decoder has. A file with more than nine is none of these VAEs."""
    found = (re.match(r"decoder\.up(?:_blocks)?\.(\d)\.", name) for name in shapes)
    return max((int(level[1]) for level in found if level), default=-1) + 1


_LDM = (
    (r"^(en|de)coder\.(post_quant_conv|quant_conv)\.", r"\2."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.(?:conv\.)?", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.(?:conv\.)?", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)  # fmt: skip


def _ldm_name(name: str, levels: int) -> str:
    """diffusers' name of a tensor; a name of diffusers stays. The decoder's levels count backwards."""
    name = _renamed(_renamed(name, _LDM), _OLD)
    up = re.match(r"decoder\.up\.(\d+)\.(block\.|upsample\.)(.*)", name)
    if up is None:
        return name
    part = "resnets." if up[2] == "block." else "upsamplers.0."
    return f"decoder.up_blocks.{levels - 1 - int(up[1])}.{part}{up[3]}"


def _ldm_class(shapes: Shapes) -> str:
    if "bn.running_mean" in shapes:
        return "AutoencoderKLFlux2"
    return "AutoencoderKLHunyuanVideo" if "decoder.conv_in.conv.weight" in shapes else "AutoencoderKL"


def _ldm_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' class, of tensors under diffusers' names."""
    video = ".conv" if "decoder.conv_in.conv.weight" in shapes else ""

    def widths(half: str) -> list[int]:
        firsts = (f"{half}.{level}.resnets.0.conv1{video}.weight" for level in range(_levels(shapes)))
        return [shapes[name][0] for name in firsts if name in shapes]

    encoder, decoder = widths("encoder.down_blocks"), widths("decoder.up_blocks")[::-1]
    levels = len(encoder or decoder)
    kinds = (
        ("HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D")
        if video
        else ("DownEncoderBlock2D", "UpDecoderBlock2D")
    )
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shapes[f"decoder.conv_in{video}.weight"][1],
        "block_out_channels": encoder or decoder,
        "layers_per_block": sum(
            f"encoder.down_blocks.0.resnets.{n}.norm1.weight" in shapes for n in range(9)
        ),
        "norm_num_groups": GROUPS,
        "down_block_types": (kinds[0],) * levels,
        "up_block_types": (kinds[1],) * levels,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
    }
    if video:
        return config
    if "bn.running_mean" in shapes:
        config["decoder_block_out_channels"] = decoder
    return config | {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


# ---------------------------------------------------------------------- Wan's naming


def _wan_config(shapes: Shapes) -> dict[str, Any]:
    """Wan 2.1 (and Qwen-Image, which is the same network) or Wan 2.2."""
    config = {
        "base_dim": shapes["encoder.conv1.weight"][0],
        "z_dim": shapes["conv2.weight"][0],
        "in_channels": shapes["encoder.conv1.weight"][1],
        "out_channels": shapes["decoder.head.2.weight"][0],
    }
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" not in shapes:
        return config
    return config | {
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "is_residual": True,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * shapes["conv2.weight"][0],
        "latents_std": [1.0] * shapes["conv2.weight"][0],
    }


_WAN = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # Wan 2.2 has blocks of layers, Wan 2.1 a flat list.
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
)
_WAN_UP = 4  # of Wan 2.1's flat list, three residual layers and an upsampler are a block


def _wan_name(name: str) -> str:
    """diffusers' name of a tensor of Wan 2.1 or 2.2."""
    name = _renamed(name, _WAN)
    flat = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name)
    if flat is None:
        return name
    block, layer = divmod(int(flat[1]), _WAN_UP)
    part = f"resnets.{layer}" if layer < _WAN_UP - 1 else "upsamplers.0"
    return f"decoder.up_blocks.{block}.{part}.{flat[2]}"
