"""The families of diffusion transformers: one file and one line each.

What other rooms use of it is here; what needs ComfyUI, in `worker.models.comfyui`.
"""

from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import HostComfyUI
from worker.checkpoints import Shapes
from worker.models import near
from worker.models.base import ModelFamily, to_whole_patches
from worker.models.controlnet import CONTROLNETS, ControlNetFamily
from worker.models.flux.family import Flux
from worker.models.folders.classes import CLASSES, of_folder
from worker.models.ip_adapter import IMAGE_OUTPUTS, Acting, IPAdapter
from worker.models.sd3.family import SD3

__all__ = [
    "CONTROLNETS",
    "FAMILIES",
    "IMAGE_OUTPUTS",
    "Acting",
    "ControlNetFamily",
    "IPAdapter",
    "ModelFamily",
    "detect",
    "in_diffusers",
    "nearest",
    "to_whole_patches",
]

FAMILIES: tuple[ModelFamily, ...] = (SD3(), Flux())
NAMES = (*(family.name for family in FAMILIES), *(f"{row.name} (folders)" for row in CLASSES.values()))


def in_diffusers(configuration: str) -> bool:
    """Whether a family here covers the models that ComfyUI calls so."""
    return any(configuration in family.configurations for family in FAMILIES)


def detect(folder: Path, shapes: Shapes, path: str) -> ModelFamily:
    """The family of a checkpoint with these tensors: by its folder's own word, where that is in the table.

    Args:
        folder: of the transformer, or its file.
        path: for messages.

    Raises:
        InvalidInput: none that is known.
    """
    family = of_folder(folder, shapes) or next((f for f in FAMILIES if f.detect(shapes)), None)
    if family is not None:
        return family
    some = ", ".join(sorted(shapes)[:3])
    raise InvalidInput(
        f"{path} is of none of the families {', '.join(NAMES)}: its {len(shapes)} tensors "
        f"begin with {some}; choose a diffusion model of one of these families."
    )


def nearest(path: Path, comfyui: HostComfyUI | None, device: torch.device) -> list[dict[str, Any]]:
    """The known models that a file looks like, as the message Compare says."""
    return near.nearest(path, FAMILIES, comfyui, device)
