"""The weight patches of a ModelPatcher in plain words, for the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import comfy.utils
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Patch, PatchSet
from comfy_xdit.protocol.spec import LoraFile
from comfy_xdit.remote import file_patch, patch_set

PREFIX = "diffusion_model."
# What lies where in the `weights` of ComfyUI's adapters. Only "alpha" is no tensor.
ADAPTERS: dict[str, tuple[str, ...]] = {
    "lora": ("up", "down", "alpha", "mid", "dora_scale", "reshape"),
    "loha": ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"),
    "lokr": ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale"),
    "glora": ("a1", "a2", "b1", "b2", "alpha", "dora_scale"),
    "oft": ("blocks", "rescale", "alpha", "dora_scale"),
    "boft": ("blocks", "rescale", "alpha", "dora_scale"),
}
PLAIN = ("diff", "set")  # a tensor to add, a tensor to put in place
# What ComfyUI itself does not compute in a well-defined way, or what changes a weight's shape.
REFUSED = {
    ("lora", "reshape"): "a LoRA that enlarges the weight (as FLUX.1 Control LoRAs do)",
    ("oft", "dora_scale"): "OFT with DoRA",
    ("boft", "dora_scale"): "BOFT with DoRA",
}

# As ComfyUI keeps them: (strength, what, strength of the weight, offset, function).
Entry = Sequence[Any]


def describe(patches: Mapping[str, Sequence[Entry]]) -> PatchSet:
    """ModelPatcher.patches as a set the ranks understand.

    Raises:
        InvalidInput: a patch of a kind they do not know; names it.
    """
    weights = {}
    for key, entries in patches.items():
        described = tuple(_describe(key, entry) for entry in entries if counts(entry))
        if described and not key.startswith(PREFIX):
            _refuse(key, "a patch outside the transformer")
        if described:
            weights[key.removeprefix(PREFIX)] = described
    return patch_set(weights)


def counts(entry: Entry) -> bool:
    """False for a patch that leaves the weight as it is."""
    strength, what, base, *_ = entry
    return strength != 0 or base != 1 or (isinstance(what, tuple) and len(what) == 2 and what[0] == "set")


def _describe(key: str, entry: Entry) -> Patch:
    strength, what, base, offset, function = entry
    if isinstance(what, LoraFile):
        return file_patch(what, float(strength))
    if function is not None and function is not comfy.utils.swap_scale_shift:
        _refuse(key, f"a patch that goes through a function ({getattr(function, '__name__', function)})")
    kind, parts = _content(key, what)
    alpha = parts.pop("alpha", None)
    for part, tensor in parts.items():
        if (kind, part) in REFUSED:
            _refuse(key, REFUSED[kind, part])
        if not isinstance(tensor, torch.Tensor):
            _refuse(key, f"a {kind} patch whose {part} is a {type(tensor).__name__}")
    return Patch(
        kind=kind,
        tensors=parts,
        strength=float(strength),
        base=float(base),
        alpha=None if alpha is None else float(alpha),
        offset=None if offset is None else tuple(int(n) for n in offset),
        swapped=function is not None,
    )


def _content(key: str, what: Any) -> tuple[str, dict[str, Any]]:
    """Kind and parts, those that are set, of an adapter or of a tuple."""
    if isinstance(what, tuple):
        kind, values = ("diff", what) if len(what) == 1 else what
        if kind in PLAIN:
            return kind, {"value": values[0]}
        _refuse(key, f"a patch of kind {kind!r}")
    if isinstance(what, list):
        _refuse(key, "a merge with another model")
    kind, values = getattr(what, "name", type(what).__name__), getattr(what, "weights", ())
    names = ADAPTERS.get(kind, ())
    if len(values) != len(names) or not names:
        _refuse(key, f"an adapter of kind {kind!r} with {len(values)} parts")
    return kind, {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _refuse(key: str, what: str) -> NoReturn:
    raise InvalidInput(
        f"{what} for {key} cannot reach the ranks; they take {', '.join((*ADAPTERS, *PLAIN))}. "
        "Remove the node that adds it, or use the stock loader instead of the xDiT one."
    )
