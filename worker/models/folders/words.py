"""What the JSON files of a diffusers folder say, with the defaults of the class they are of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import read_json
from worker.models.base import MAX_BLOCKS

# What old folders of two classes say, and how diffusers tells them apart.
LEGACY = "Transformer2DModel"
BY_NORM = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
LARGEST = 1 << 20  # no published configuration counts or measures anything larger


def class_name(folder: Path) -> str:
    """diffusers' class of the transformer in a folder; "" where nothing says it."""
    config = folder / "config.json"
    return _class_name(read_json(config)) if config.is_file() else ""


def words_of(file: Path) -> dict[str, Any]:
    """The arguments of the class that a configuration names: as it says, or the class's defaults.

    Raises:
        InvalidInput: it is missing or damaged, or names no class of diffusers'.
    """
    import diffusers

    told = read_json(file)
    made = getattr(diffusers, _class_name(told) or "no class", None)
    if not isinstance(made, type):
        raise InvalidInput(
            f"{file} is of {told.get('_class_name')!r}, which is no class of this diffusers "
            f"({diffusers.__version__}); choose a complete diffusers folder, or update diffusers."
        )
    parameters = inspect.signature(made.__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    return defaults | {key: value for key, value in told.items() if key in parameters}


def _class_name(told: Mapping[str, Any]) -> str:
    name = told.get("_class_name")
    if name == LEGACY:
        name = BY_NORM.get(str(told.get("norm_type")), name)
    return name if isinstance(name, str) else ""


def checked(words: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`words`, if their numbers are some that a model can have: larger ones would fill the memory."""
    for key, value in words.items():
        most = MAX_BLOCKS if "layers" in key else LARGEST
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, (int, float)) and not abs(one) <= most:
                raise InvalidInput(
                    f"{file} says {key} {one}, and no known model has more than {most}; it is damaged: "
                    "download it again."
                )
    return dict(words)
