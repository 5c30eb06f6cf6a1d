"""What the ranks hold already of tensors and weight patches: a thing is sent once, and never stale."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import torch

from comfy_xdit.protocol.messages import Keep, Known, PatchSet
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.remote.patches import by_name

# Smaller tensors cost less to send than to compare.
REMEMBERED_BYTES = 4096
REMEMBERED_TENSORS = 16
# What the ranks keep of sets of patches that are not in use, for graphs that switch between them.
KEPT_BYTES = 2 << 30
_names = itertools.count(1)


class SentTensors:
    """Which tensors the ranks already hold: compared by content, so never stale."""

    def __init__(self) -> None:
        self._generation = -1
        self._held: dict[int, torch.Tensor] = {}
        self._forget: list[int] = []

    def refer(self, conditions: dict[str, Any], generation: int) -> dict[str, Any]:
        """`conditions` with each large tensor replaced by Known, or by Keep the first time."""
        if generation != self._generation:  # new processes hold nothing
            self._generation, self._held, self._forget = generation, {}, []
        return {name: self._refer(value) for name, value in conditions.items()}

    def take_forgotten(self) -> tuple[int, ...]:
        """Names the ranks may drop, oldest first; asked once per message."""
        while len(self._held) > REMEMBERED_TENSORS:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._forget.append(oldest)
        forgotten, self._forget = tuple(self._forget), []
        return forgotten

    def names(self) -> tuple[int | str, ...]:
        """Every name the ranks may hold a tensor under."""
        return (*self._held, *self._forget)

    def reset(self) -> None:
        """After a failed call nobody knows what arrived: send everything anew."""
        self._forget += list(self._held)
        self._held = {}

    def _refer(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._refer(v) for v in value]
        if isinstance(value, tuple):
            return tuple(self._refer(v) for v in value)
        if isinstance(value, dict):
            return {k: self._refer(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor) or value.nbytes < REMEMBERED_BYTES:
            return value
        for name, held in self._held.items():
            if (
                held.shape == value.shape
                and held.dtype == value.dtype
                and held.device == value.device
                and torch.equal(held, value)
            ):
                self._held[name] = self._held.pop(name)  # most recently used last
                return Known(name)
        name = next(_names)
        self._held[name] = value.clone()  # the caller may write into its tensor later
        return Keep(name, value)


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
            weights = {k: tuple(by_name(p, known) for p in v) for k, v in patches.weights.items()}
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


def _sizes(patches: PatchSet) -> dict[str, int]:
    kept = (t for group in patches.weights.values() for patch in group for t in patch.tensors.values())
    return {keep.name: keep.tensor.nbytes for keep in kept}


# Of all handles of a layout: its ranks hold one store of patch sets, named by content.
sent_patches: defaultdict[ParallelConfig, SentPatches] = defaultdict(SentPatches)
