"""ControlNet files: what kind each is, told by the names and shapes of its tensors.

Both sides ask: the node that loads a ControlNet, so that a wrong file is an error of that node, and the
ranks, before they read a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.safetensors_header import read_header

Shapes = Mapping[str, tuple[int, ...]]
TOKEN_PIXELS = 4  # latent pixels of a token
STOCK = "use the stock ControlNet nodes, which work with an xDiT MODEL"
HUNYUAN = "a ControlNet for HunyuanDiT, a family the ranks do not have"
PIXART = "a ControlNet for PixArt, a family the ranks do not have"
STABILITY = "a ControlNet in Stability's format for SD3.5 large"
OTHER = "choose a ControlNet for SD3 or FLUX.1"


@dataclass(frozen=True)
class ControlNetKind:
    """What a ControlNet is made for, and what it takes.

    Args:
        family: "sd3" or "flux".
        naming: "diffusers", or "xlabs" (Black Forest Labs' names, as XLabs publishes its own).
        takes: "latents" of the hint picture, or its "pixels".
        modes: control types of a union ControlNet; 0 of any other.
    """

    family: str
    naming: str
    takes: str
    modes: int = 0


# A tensor that tells what a file is which is no ControlNet for the ranks, what that is, and a remedy.
_REFUSED = (
    ("controlnet_blocks.0.linear.weight", "a MistoLine ControlNet for FLUX.1", STOCK),
    ("transformer_blocks.0.adaLN_modulation.1.bias", STABILITY, STOCK),
    ("transformer_blocks.0.img_mlp.net.0.proj.weight", "a ControlNet for Qwen-Image", OTHER),
    ("after_proj_list.18.bias", HUNYUAN, OTHER),
    ("input_block.weight", HUNYUAN, OTHER),
    ("controlnet_blocks.0.after_proj.weight", PIXART, OTHER),
    ("controlnet.0.after_proj.weight", PIXART, OTHER),
    ("controlnet_cond_embedding.conv_in.weight", "a ControlNet for SD1.5, SD2 or SDXL", OTHER),
    ("zero_convs.0.0.weight", "a ControlNet for SD1.5, SD2 or SDXL", OTHER),
    ("control_model.zero_convs.0.0.weight", "a ControlNet for SD1.5, SD2 or SDXL", OTHER),
    ("lora_controlnet", "a Control-LoRA for SDXL", OTHER),
)  # fmt: skip
_LORA = ("lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight")
_TRANSFORMERS = ("joint_blocks.0.", "double_blocks.0.", "transformer_blocks.0.")


def kind_of(shapes: Shapes, name: str) -> ControlNetKind:
    """The kind of a file with these tensors.

    Raises:
        InvalidInput: it is no ControlNet, or none that runs in the ranks; what it is instead.
    """
    for mark, what, remedy in _REFUSED:
        if mark in shapes:
            raise InvalidInput(f"{name} is {what}, which does not run in the ranks; {remedy}.")
    if "controlnet_blocks.0.weight" in shapes:
        if "pos_embed_input.proj.weight" in shapes:
            return _sd3(shapes, name)
        if "double_blocks.0.img_attn.qkv.weight" in shapes and "input_hint_block.0.weight" in shapes:
            return ControlNetKind("flux", "xlabs", "pixels")
        if "controlnet_x_embedder.weight" in shapes and "x_embedder.weight" in shapes:
            return _flux(shapes, name)
    raise _no_controlnet(shapes, name)


def kind_at(path: Path, name: str) -> ControlNetKind:
    """The kind of the file, or of the diffusers folder, at `path`; reads headers and no weight.

    Raises:
        InvalidInput: as `kind_of`, or the file is damaged, or no safetensors file.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"no .safetensors file in {path}; choose a folder of a ControlNet in safetensors.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= {tensor: stored.shape for tensor, stored in read_header(file).items()}
    return kind_of(shapes, name)


def _sd3(shapes: Shapes, name: str) -> ControlNetKind:
    if "context_embedder.weight" not in shapes:
        raise InvalidInput(
            f"{name} is a ControlNet for SD3.5 large without a prompt of its own, which does not run in the "
            f"ranks; {STOCK}, with the file in Stability's format."
        )
    picture = _inputs(shapes, "pos_embed.proj.weight", name) if "pos_embed.proj.weight" in shapes else 0
    _refuse_inpainting(name, _inputs(shapes, "pos_embed_input.proj.weight", name), picture)
    return ControlNetKind("sd3", "diffusers", "latents")


def _flux(shapes: Shapes, name: str) -> ControlNetKind:
    hint, picture = (_inputs(shapes, f"{part}x_embedder.weight", name) for part in ("controlnet_", ""))
    _refuse_inpainting(name, hint // TOKEN_PIXELS, picture // TOKEN_PIXELS)
    takes = "pixels" if "input_hint_block.conv_in.weight" in shapes else "latents"
    modes = 0
    if "controlnet_mode_embedder.weight" in shapes:
        modes = _matrix(shapes, "controlnet_mode_embedder.weight", name)[0]
    return ControlNetKind("flux", "diffusers", takes, modes)


def _inputs(shapes: Shapes, key: str, name: str) -> int:
    """How many channels the layer with the weight `key` takes."""
    return _matrix(shapes, key, name)[1]


def _matrix(shapes: Shapes, key: str, name: str) -> tuple[int, ...]:
    if len(shapes[key]) < 2:
        raise InvalidInput(
            f"{name}: {key} has shape {shapes[key]}, a ControlNet has a matrix there; the file is damaged: "
            "download it again."
        )
    return shapes[key]


def _refuse_inpainting(name: str, hint: int, picture: int) -> None:
    if hint > picture > 0:
        raise InvalidInput(
            f"{name} takes a hint of {hint} channels beside a picture of {picture}: an inpainting "
            f"ControlNet, which does not run in the ranks; {STOCK}."
        )


def _no_controlnet(shapes: Shapes, name: str) -> InvalidInput:
    if not shapes:
        return InvalidInput(f"{name} holds no tensors; download it again.")
    if any(key.endswith(_LORA) for key in shapes):
        return InvalidInput(f"{name} is a LoRA, no ControlNet; load it with xDiT Lora Loader.")
    if any(part in key for key in shapes for part in _TRANSFORMERS) and not any(
        "controlnet" in key for key in shapes
    ):
        return InvalidInput(f"{name} is a diffusion model, no ControlNet; load it with an xDiT loader.")
    some = ", ".join(sorted(shapes)[:3])
    return InvalidInput(
        f"{name} is no ControlNet that runs in the ranks: its {len(shapes)} tensors begin with {some}; "
        f"{OTHER}."
    )
