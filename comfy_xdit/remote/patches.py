"""Sets of weight patches (LoRA and its kin), named by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import NO_PATCHES, Keep, Known, Patch, PatchSet
from comfy_xdit.protocol.plain import flatten
from comfy_xdit.protocol.spec import LoraFile

# A head of messages.py holds about 500 bytes per patch, and at most 4 MiB (rpc.HEAD_LIMIT).
MAX_PATCHES = 6000
Weights = dict[str, tuple[Patch, ...]]


def patch_set(weights: Weights) -> PatchSet:
    """The set with these patches, whose tensors are plain ones, by native name of the weight.

    Raises:
        InvalidInput: more patches than a message carries.
    """
    count = sum(map(len, weights.values()))
    if count > MAX_PATCHES:
        raise InvalidInput(
            f"the LoRAs of this MODEL make {count} patches, at most {MAX_PATCHES} reach the ranks; "
            "use fewer LoRAs, or merge some of them into one file."
        )
    if not count:
        return NO_PATCHES
    named = {key: tuple(_named(patch) for patch in patches) for key, patches in weights.items() if patches}
    recipe = {key: tuple(by_name(patch, None) for patch in patches) for key, patches in named.items()}
    text = json.dumps(flatten(recipe).head)
    return PatchSet(hashlib.sha256(text.encode()).hexdigest(), named)


def with_file(patches: PatchSet, file: LoraFile, weights: Iterable[str], strength: float) -> PatchSet:
    """A set of files alone, and after them `file`, which changes `weights`."""
    further = file_patch(file, strength)
    held = patches.weights or {}
    return patch_set({**held, **{key: (*held.get(key, ()), further) for key in weights}})


def file_patch(file: LoraFile, strength: float) -> Patch:
    """What `file` says of a weight."""
    return Patch("file", {}, strength, file=file)


def _named(patch: Patch) -> Patch:
    """Each tensor with a name made of its content."""
    return replace(
        patch,
        tensors={part: Keep(_digest(t), t) for part, t in patch.tensors.items() if t is not None},
    )


def by_name(patch: Patch, known: dict[str, int] | None) -> Patch:
    """Tensors that are `known` by their name alone; None: all of them."""
    return replace(
        patch,
        tensors={
            part: Known(t.name) if known is None or t.name in known else t
            for part, t in patch.tensors.items()
        },
    )


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
