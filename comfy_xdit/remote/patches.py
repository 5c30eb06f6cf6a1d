"""Weight patches (LoRA and its kin) on their way to the ranks: named by content, sent once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import NO_PATCHES, Keep, Known, Patch, PatchSet, flatten
from comfy_xdit.protocol.spec import LoraFile

# What the ranks keep of sets that are not in use, for graphs that switch between them.
KEPT_BYTES = 2 << 30
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
    recipe = {key: tuple(_by_name(patch, None) for patch in patches) for key, patches in named.items()}
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


class SentPatches:
    """Which sets the ranks hold. They hold a tensor as long as a set that has it."""

    def __init__(self) -> None:
        self._generation = -1
        self._held: dict[str, dict[str, int]] = {}  # set -> its tensors and their bytes
        self._forget: list[str] = []
        self._last = ""

    def refer(self, patches: PatchSet, generation: int) -> PatchSet:
        """`patches` without what the ranks hold, and with the names of sets they may drop.

        Raises:
            InvalidInput: a file that they would have to read now has gone or changed.
        """
        if generation != self._generation:  # new processes hold nothing
            self._generation, self._held, self._forget, self._last = generation, {}, [], ""
        if patches.name != self._last:
            self._check_files(patches)
        weights = None
        if patches.name in self._held:
            self._held[patches.name] = self._held.pop(patches.name)  # most recently used last
        elif patches.name:
            known = self._tensors()
            weights = {k: tuple(_by_name(p, known) for p in v) for k, v in patches.weights.items()}
            self._held[patches.name] = _sizes(patches)
        while len(self._held) > 1 and sum(self._tensors().values()) > KEPT_BYTES:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._forget.append(oldest)
        forget = tuple(name for name in self._forget if name != patches.name)
        self._forget, self._last = [], patches.name
        return PatchSet(patches.name, weights, forget)

    def reset(self) -> None:
        """After a failed call nobody knows what arrived: send everything anew."""
        self._forget += list(self._held)
        self._held, self._last = {}, ""

    def _check_files(self, patches: PatchSet) -> None:
        """Asked here, before any rank has begun: one that found out alone would leave the others waiting."""
        for file in {p.file for group in (patches.weights or {}).values() for p in group if p.file}:
            file.check()

    def _tensors(self) -> dict[str, int]:
        return {name: size for tensors in self._held.values() for name, size in tensors.items()}


def _named(patch: Patch) -> Patch:
    """Each tensor with a name made of its content."""
    return replace(
        patch,
        tensors={part: Keep(_digest(t), t) for part, t in patch.tensors.items() if t is not None},
    )


def _by_name(patch: Patch, known: dict[str, int] | None) -> Patch:
    """Tensors that are `known` by their name alone; None: all of them."""
    return replace(
        patch,
        tensors={
            part: Known(t.name) if known is None or t.name in known else t
            for part, t in patch.tensors.items()
        },
    )


def _sizes(patches: PatchSet) -> dict[str, int]:
    kept = (t for group in patches.weights.values() for patch in group for t in patch.tensors.values())
    return {keep.name: keep.tensor.nbytes for keep in kept}


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
