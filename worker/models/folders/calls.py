"""What diffusers' pipelines give a class beside latent, time and prompt: positions, labels, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput

Config = Mapping[str, Any]
Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (tokens, width of a head)
HUNYUAN_SIDE = 64  # of the latents that HunyuanDiT's positions are made for: 512 pixels
SMALLER = 8  # than a picture are CogVideoX's and HunyuanDiT's latents
WAN_TEXT = 512  # tokens of a prompt where pictures stand before it
OFFSET = 2.0  # what CogVideoX 1.5 is given as `ofs` to make a video of a picture


def cogvideox(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """CogVideoX, 1.5 and ConsisID: rotary tables of some, an offset of those that begin with a picture."""
    _refuse_what_has_no_position(config, x, conditions.get("context"))
    frames, rows, columns = x.shape[2] // (config.get("patch_size_t") or 1), *_grid(config, x)
    more: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        base = tuple(config[f"sample_{side}"] // config["patch_size"] for side in ("height", "width"))
        stretched = config.get("patch_size_t") is None
        table = _rotary_3d(config["attention_head_dim"], frames, (rows, columns), base, stretched)
        more["image_rotary_emb"] = _on(x.device, table)
    if config.get("ofs_embed_dim"):
        more["ofs"] = x.new_full((1,), OFFSET)
    return more


def dit(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """DiT: labels (B, 1) or (B,) of ImageNet's classes, -1 is of none."""
    if x.shape[-1] != x.shape[-2]:
        raise InvalidInput(
            f"the latent is {x.shape[-1]} x {x.shape[-2]}, and diffusers' DiT draws squares only; choose "
            "equal width and height."
        )
    labels, classes = (
        conditions["class_labels"].reshape(x.shape[0], -1)[:, 0].long(),
        config["num_embeds_ada_norm"],
    )
    if int(labels.min()) < -1 or int(labels.max()) >= classes:
        raise InvalidInput(
            f"class labels {labels.tolist()} are not all among the {classes} of this model; choose 0 to "
            f"{classes - 1}, or -1 for none."
        )
    return {"class_labels": torch.where(labels < 0, classes, labels)}


def hunyuan_dit(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """HunyuanDiT: a rotary table, and of 1.0 and 1.1 the sizes and a style, of which there is one."""
    for name, most in (("context", "text_len"), ("encoder_hidden_states_t5", "text_len_t5")):
        given = conditions.get(name)
        if isinstance(given, torch.Tensor) and given.shape[1] != config[most]:
            raise InvalidInput(
                f"{name} has {given.shape[1]} tokens, and HunyuanDiT takes {config[most]}, padded; shorten "
                "the prompt, or encode it with the CLIP of this folder."
            )
    table = _rotary_2d(config["attention_head_dim"], _grid(config, x), HUNYUAN_SIDE // config["patch_size"])
    more = {"image_rotary_emb": _on(x.device, table)}
    sizes = conditions.get("image_meta_size")
    if sizes is None:
        height, width = (float(SMALLER * size) for size in x.shape[-2:])
        sizes = torch.tensor([[height, width, height, width, 0.0, 0.0]], device=x.device)
    style = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return more | {"image_meta_size": sizes.to(x.dtype).expand(x.shape[0], -1), "style": style}


def latte(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Latte: nothing, but it has positions for as many frames only as it was made for."""
    if x.shape[2] not in (1, config["video_length"]):
        raise InvalidInput(
            f"the latent has {x.shape[2]} frames, and this Latte draws {config['video_length']}, or 1; make "
            "it with as many."
        )
    return {}


def pixart(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """PixArt: alpha of 1024 x 1024 is told height and width in pixels, (B, 2), and their ratio, (B, 1)."""
    told = config["use_additional_conditions"]
    if not (config["sample_size"] == 128 if told is None else told):
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    height, width = (float(SMALLER * size) for size in x.shape[-2:])
    size = x.new_tensor([[height, width]]).expand(x.shape[0], -1)
    return {"added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}}


def wan(config: Config, x: torch.Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Wan: of a first and a last frame, whose tokens ComfyUI has in one row, diffusers wants one row each."""
    pictures = conditions.get("clip_fea")
    if not isinstance(pictures, torch.Tensor):
        return {}
    _refuse_other_length(conditions.get("context"), WAN_TEXT)  # the class takes all before for pictures
    if config["pos_embed_seq_len"] is None:
        return {}
    rows = pictures.reshape(-1, config["pos_embed_seq_len"] // 2, pictures.shape[-1])
    return {"encoder_hidden_states_image": rows.to(x.dtype)}


def _refuse_what_has_no_position(config: Config, x: torch.Tensor, context: Any) -> None:
    """Positions that are added to text and picture are for one length, and learned ones for one size."""
    learned = config["use_learned_positional_embeddings"]
    most = config["max_text_seq_length"]
    added = learned or not config["use_rotary_positional_embeddings"]
    if added:
        _refuse_other_length(context, most)
    height, width = config["sample_height"], config["sample_width"]
    if learned and tuple(x.shape[-2:]) != (height, width):
        raise InvalidInput(
            f"the latent is {x.shape[-1]} x {x.shape[-2]}, and this model has positions for {width} x "
            f"{height} alone; choose {width * SMALLER} x {height * SMALLER} pixels."
        )


def _refuse_other_length(context: Any, most: int) -> None:
    if isinstance(context, torch.Tensor) and context.shape[1] != most:
        raise InvalidInput(
            f"the prompt has {context.shape[1]} tokens, and this model takes {most}, padded; encode it with "
            "the CLIP of its folder."
        )


def _grid(config: Config, x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return x.shape[-2] // config["patch_size"], x.shape[-1] // config["patch_size"]


def _on(device: torch.device, table: Table) -> Table:
    return table[0].to(device), table[1].to(device)


@lru_cache(maxsize=8)
def _rotary_3d(
    width: int, frames: int, grid: tuple[int, int], base: tuple[int, int], stretched: bool
) -> Table:
    """As CogVideoX's pipelines make it; `stretched` to what the model was made for, else cut out of it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if not stretched:
        most = tuple(map(max, grid, base))
        return get_3d_rotary_pos_embed(width, None, grid, frames, grid_type="slice", max_size=most)
    return get_3d_rotary_pos_embed(width, _crop(grid, base), grid, frames)


@lru_cache(maxsize=8)
def _rotary_2d(width: int, grid: tuple[int, int], base: int) -> Table:
    """As HunyuanDiT's pipeline makes it."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return get_2d_rotary_pos_embed(width, _crop(grid, (base, base)), grid, output_type="pt")


def _crop(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a grid of this shape lies within the one a model was made for: its first and its last corner."""
    (rows, columns), (height, width) = grid, base
    if rows / columns > height / width:
        inner = height, round(height / rows * columns)
    else:
        inner = round(width / columns * rows), width
    first = round((height - inner[0]) / 2.0), round((width - inner[1]) / 2.0)
    return first, (first[0] + inner[0], first[1] + inner[1])
