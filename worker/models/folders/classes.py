"""The classes of diffusers' whose folders are read: one row each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import Shapes
from worker.models.folders import calls
from worker.models.folders.family import Argument, Config, FolderClass, FolderFamily
from worker.models.folders.words import class_name

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
IN_FILES = "load its single file with xDiT Load Diffusion Model inside ComfyUI"


def _context(width: str) -> dict[str, Argument]:
    return {TEXT: Argument("context", width)}


def _mask(**more: Any) -> dict[str, Argument]:
    return {MASK: Argument("attention_mask", option="attention_mask", mask="context", **more)}


def _wan(config: Config) -> dict[str, Any]:
    pictured = config["image_dim"] is not None
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kind = {"model_type": "i2v" if pictured else "t2v", "in_dim": config["in_channels"], "dim": width}
    return {"image_model": "wan2.1"} | kind


def _whole_wan(config: Config, index: Config) -> None:
    if (index.get("transformer_2") or [None])[0] is not None or index.get("expand_timesteps"):
        raise InvalidInput(
            "this folder is of a Wan 2.2 with two models or a time for each token, which is not read from "
            f"folders; {IN_FILES}."
        )


def _whole_hunyuan_video(config: Config, index: Config) -> None:
    if config["image_condition_type"] == "token_replace":
        raise InvalidInput(
            "this HunyuanVideo is given its first frame in place of noise (token_replace), which is not read "
            f"from folders; {IN_FILES}."
        )


CLASSES: dict[str, FolderClass] = {
    "CogVideoXTransformer3DModel": FolderClass(
        "cogvideox", _context("text_embed_dim"), calls.cogvideox, video=True, frames_first=True,
        text_tokens=226,
    ),
    "ConsisIDTransformer3DModel": FolderClass(
        "consisid",
        _context("text_embed_dim")
        | {
            name: Argument(name, option=name, remedy="connect a node that encodes a face for it")
            for name in ("id_cond", "id_vit_hidden")
        },
        calls.cogvideox, video=True, frames_first=True, text_tokens=226, products=16.0,
    ),
    "DiTTransformer2DModel": FolderClass(
        "dit",
        {
            "class_labels": Argument(
                "class_labels", option="class_labels", remedy="make it with xDiT Class Label"
            )
        },
        calls.dit, text_tokens=0,
    ),
    "HunyuanDiT2DModel": FolderClass(
        "hunyuan-dit",
        {
            TEXT: Argument("context", "cross_attention_dim"),
            "text_embedding_mask": Argument("text_embedding_mask", option="attention_mask", mask="context"),
            "encoder_hidden_states_t5": Argument(
                "encoder_hidden_states_t5", "cross_attention_dim_t5", "conditioning_mt5xl"
            ),
            "text_embedding_mask_t5": Argument(
                "text_embedding_mask_t5", option="attention_mask_mt5xl", mask="encoder_hidden_states_t5"
            ),
        },
        calls.hunyuan_dit, ("image_meta_size",), text_tokens=333, products=16.0,
        comfyui=lambda config: {
            "image_model": "hydit1" if config["use_style_cond_and_image_meta_size"] else "hydit"
        },
    ),
    "HunyuanVideoTransformer3DModel": FolderClass(
        "hunyuan-video",
        _context("text_embed_dim")
        | _mask()
        | {
            "pooled_projections": Argument("y", "pooled_projection_dim", "pooled_output"),
            "guidance": Argument("guidance", "guidance_embeds", "guidance", default=6.0, factor=1000.0),
        },
        needs=_whole_hunyuan_video, video=True, guided=False, text_tokens=256,
        comfyui=lambda config: {"image_model": "hunyuan_video", "in_channels": config["in_channels"]},
    ),
    "LatteTransformer3DModel": FolderClass(
        "latte", _context("caption_channels"), calls.latte, video=True, text_tokens=120, products=14.0,
    ),
    "MochiTransformer3DModel": FolderClass(
        "mochi", _context("text_embed_dim") | _mask(), video=True, backwards=True, text_tokens=256,
    ),
    "PixArtTransformer2DModel": FolderClass(
        "pixart", _context("caption_channels") | _mask(optional=True), calls.pixart, text_tokens=300,
        products=16.0,
    ),
    "SanaTransformer2DModel": FolderClass(
        "sana",
        _context("caption_channels") | _mask(optional=True), text_tokens=300, products=14.0,
    ),
    "WanTransformer3DModel": FolderClass(
        "wan",
        _context("text_dim")
        | {
            "encoder_hidden_states_image": Argument(
                "clip_fea", "image_dim", "clip_vision_output", optional=True
            )
        },
        calls.wan, needs=_whole_wan, video=True, products=16.0, comfyui=_wan,
    ),
}  # fmt: skip


def of_folder(folder: Path, shapes: Shapes) -> FolderFamily | None:
    """The family of a transformer's folder in a pipeline's; None where its class has no row.

    Raises:
        InvalidInput: a part of its pipeline is missing, damaged, or of a variant that is not read.
    """
    if not (folder.parent / "model_index.json").is_file():
        return None
    row = CLASSES.get(class_name(folder)) if folder.is_dir() else None
    if row is None:
        return None
    try:
        return FolderFamily(folder, row, shapes)
    except InvalidInput:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidInput(
            f"{folder.parent} looks like {row.name}, but its configurations say what no such model has "
            f"({error}); it is damaged: download it again."
        ) from error
