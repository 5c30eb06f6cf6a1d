"""What ControlNets on the host hand to the transformer.

A stock ControlNet runs where ComfyUI runs it. Its residuals, one per block of the transformer and
many of them the same tensor, are plain tensors and travel with the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from safetensors import safe_open

from comfy_xdit.protocol import gguf_header
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.safetensors_header import read_header
from comfy_xdit.protocol.spec import changed

# Lists by where a transformer adds them. Which of them a family reads, its file in the ranks says.
PLACES = ("input", "output")
OF_CLASSES = (*PLACES, "middle")  # what ComfyUI's own classes read, U-Nets among them
# Layers of SD3 whose weights a ControlNet for SD3.5 takes over from the model it is used with.
EMBEDDERS = ("x_embedder", "y_embedder")
Stamp = tuple[int, int] | None  # size in bytes and modification time in ns; None where no file is


def residuals(
    control: Mapping[str, Any] | None, places: tuple[str, ...] = PLACES
) -> dict[str, list[torch.Tensor | None]] | None:
    """The residuals of one call by place, or None when there are none.

    Raises:
        InvalidInput: the control says something else than residuals at `places`.
    """
    if not control:
        return None
    found: dict[str, list[torch.Tensor | None]] = {}
    for place, given in control.items():
        if not given:
            continue
        if place not in places or not isinstance(given, (list, tuple)) or not all(map(_residual, given)):
            raise InvalidInput(
                f"a ControlNet gives {place!r} to the transformer, of which the ranks know nothing (they "
                f"take tensors under {' and '.join(places)}). Remove the ControlNet node, or use the stock "
                "loader instead of the xDiT one."
            )
        found[place] = list(given)
    return found or None


def _residual(value: Any) -> bool:
    return value is None or isinstance(value, torch.Tensor)


def lend_embedders(transformer: torch.nn.Module, files: list[Path]) -> None:
    """Have the twin's embedders give their weights from the model's files when they are asked.

    A ControlNet for SD3.5 copies them before each run. They are a few megabytes; the other weights
    stay in the ranks.
    """
    if not hasattr(transformer, "joint_blocks"):
        return
    stamps = {file: _stamp(file) for file in files}
    for name in EMBEDDERS:
        embedder = getattr(transformer, name)
        embedder.state_dict = _lent(embedder, name, stamps)


def _lent(
    embedder: torch.nn.Module, name: str, stamps: Mapping[Path, Stamp]
) -> Callable[..., dict[str, Any]]:
    """The `state_dict` of an embedder; refers to it weakly, for it will refer to this function.

    `stamps` are the model's files, as they were when the model was loaded.
    """
    owner = weakref.ref(embedder)
    stock, names = type(embedder).state_dict, tuple(embedder.state_dict())

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if args or kwargs:  # as a part of the whole transformer, which nobody may read
            return stock(owner(), *args, **kwargs)
        for file, stamp in stamps.items():
            if _stamp(file) != stamp:
                raise InvalidInput(changed(str(file)))
        return {part: _stored(list(stamps), f"{name}.{part}") for part in names}

    return state_dict


def _stamp(file: Path) -> Stamp:
    """Of a file as it is now."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _stored(files: list[Path], name: str) -> torch.Tensor:
    """The tensor that ComfyUI's SD3 calls `name`, under whatever name it has in the files."""
    spellings = {name, *(other for ours, other, *_ in comfy.utils.MMDIT_MAP_BASIC if ours == name)}
    for file in files:
        gguf = gguf_header.is_gguf(file)
        for key in gguf_header.read_header(file).tensors if gguf else read_header(file):
            if any(key == spelling or key.endswith(f"diffusion_model.{spelling}") for spelling in spellings):
                if gguf:
                    return torch.from_numpy(gguf_header.read_numbers(file, key))
                with safe_open(file, framework="pt") as stored:
                    return stored.get_tensor(key)
    raise InvalidInput(
        f"{files[0]} has no tensor {name}, which this ControlNet takes over from the model; "
        "use a complete file."
    )
