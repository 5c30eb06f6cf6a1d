"""LoRA files as the ranks read them: which weights they change, and whether they can."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Patch
from comfy_xdit.protocol.spec import LoraFile
from worker.checkpoints import FLOATS, Checkpoint, Shapes, Source
from worker.patches.adapters import patched
from worker.patches.lora_names import READ, TEXT_ENCODERS, LoraNames, Place

KEPT_FILES = 32  # whose contents are remembered: names and shapes, no tensors
# What each kind cannot do without: one of the sets.
NEEDED: dict[str, tuple[set[str], ...]] = {
    "lora": ({"up", "down"},),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "lokr": ({"w1", "w2"}, {"w1", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2"}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    "glora": ({"a1", "a2", "b1", "b2"},),
    "oft": ({"blocks"},),
    "diff": ({"value"},),
    "set": ({"value"},),
    "bias": ({"value"},),
}
REFUSED = {
    "reshape": "it enlarges the weight, as FLUX.1 Control LoRAs do",
    "magnitude": "it is PEFT's DoRA (lora_magnitude_vector); convert it to a file with dora_scale",
}
# Kinds whose parts may be vectors.
WHOLE = ("diff", "set", "bias")


@dataclass(frozen=True)
class FileTensor:
    """A tensor that stays in its file until it is needed."""

    file: LoraFile
    name: str
    checkpoint: Checkpoint = field(compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self.checkpoint.shapes[self.name]

    def read(self) -> torch.Tensor:
        """Its values, fp32 on CPU. Raises InvalidInput if the file is no longer the same."""
        source = {self.name: Source(self.name)}
        return self.checkpoint.tensors(source, torch.float32)[self.name]


@dataclass(frozen=True)
class Contents:
    """What a file says: patches at strength 1 by native name, and the tensors it has no use for."""

    weights: dict[str, tuple[Patch, ...]]
    unmatched: tuple[str, ...]
    text_encoders: int


class Names(Protocol):
    """What a family of models says of its weights' names (worker/models/base.py)."""

    name: str

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]: ...

    def lora_names(self, config: dict[str, Any]) -> dict[str, Source]: ...

    def mapping(self, shapes: Shapes, config: dict[str, Any]) -> dict[str, Source]: ...


class LoraFiles:
    """Reads LoRA files for one model. The whole model counts, also where this rank has a part of it.

    Args:
        family: what the model is, in words.
        names: what LoRA files call its weights.
        shapes: of its weights, by native name.
    """

    def __init__(self, family: str, names: LoraNames, shapes: Shapes):
        self._family, self._names, self._shapes = family, names, shapes
        self._read: dict[LoraFile, Contents] = {}

    @classmethod
    def of(cls, family: Names, config: dict[str, Any], shapes: Shapes) -> LoraFiles:
        """For a family with `config`, whose file has tensors of these shapes."""
        native = family.native_mapping(config)
        names = LoraNames(native, family.lora_names(config))
        return cls(family.name, names, _native_shapes(native, family.mapping(shapes, config), shapes))

    def expand(self, weights: dict[str, tuple[Patch, ...]]) -> dict[str, tuple[Patch, ...]]:
        """Patches of the kind `file` replaced by what the file says of the weight, the others as they are.

        Raises:
            InvalidInput: a file has gone or changed.
        """
        return {
            key: tuple(part for patch in patches for part in self._parts(key, patch))
            for key, patches in weights.items()
        }

    def check(self, file: LoraFile) -> dict[str, Any]:
        """The answer to CheckLora.

        Raises:
            InvalidInput: nothing in the file matches, or something that does could not be applied.
        """
        contents = self._contents(file)
        for key, patches in contents.weights.items():
            for patch in patches:
                self._try(file, key, patch)
        _check_finite(file, contents)
        return {
            "weights": list(contents.weights),
            "unmatched": list(contents.unmatched),
            "text_encoders": contents.text_encoders,
        }

    def _parts(self, key: str, patch: Patch) -> tuple[Patch, ...]:
        if patch.file is None:
            return (patch,)
        said = self._contents(patch.file).weights[key]
        return tuple(replace(part, strength=patch.strength) for part in said)

    def _contents(self, file: LoraFile) -> Contents:
        if file not in self._read:
            self._read[file] = self._open(file)
            for oldest in list(self._read)[:-KEPT_FILES]:
                del self._read[oldest]
        return self._read[file]

    def _open(self, file: LoraFile) -> Contents:
        checkpoint = _checkpoint(file)
        groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        rest = []
        for name in checkpoint.shapes:
            place = self._names.place(name)
            if place is None:
                rest.append(name)
            else:
                _add(groups, place, name)
        weights: dict[str, list[Patch]] = {}
        for (written, module), kinds in groups.items():
            shared = kinds.pop("", {})
            if not kinds:  # an alpha of nothing
                rest += shared.values()
            for kind, parts in kinds.items():
                self._add_patch(weights, _Change(file, checkpoint, written, kind, parts, shared), module)
        texts = [name for name in rest if name.startswith(TEXT_ENCODERS)]
        unmatched = tuple(name for name in rest if not name.startswith(TEXT_ENCODERS))
        if not weights:
            raise self._nothing_matches(file, len(texts), unmatched)
        return Contents({key: tuple(patches) for key, patches in weights.items()}, unmatched, len(texts))

    def _add_patch(self, weights: dict[str, list[Patch]], change: _Change, module: str) -> None:
        source = self._names.bias(module) if change.kind == "bias" else self._names.weight(module)
        weights.setdefault(source.key, []).append(change.patch(source))

    def _try(self, file: LoraFile, key: str, patch: Patch) -> None:
        """Compute with shapes alone. Raises InvalidInput where they do not fit."""
        weight = torch.empty(self._shapes[key], device="meta")
        # OFT's alpha is a limit that is compared with values; shapes do not depend on it.
        shapes = replace(patch, alpha=None)
        try:
            patched(key, weight, (shapes,), _without_values)
        except InvalidInput as error:
            raise InvalidInput(f"{file.name}: {error}") from error
        except (IndexError, ValueError) as error:
            raise InvalidInput(
                f"{file.name}: a {patch.kind} patch for {key} has shapes that fit no weight ({error}); "
                "the file is damaged: download it again."
            ) from error

    def _nothing_matches(self, file: LoraFile, texts: int, unmatched: tuple[str, ...]) -> InvalidInput:
        if texts and not unmatched:
            return InvalidInput(
                f"all {texts} tensors of {file.name} are for text encoders, none for the diffusion model; "
                "choose a LoRA that was trained on the diffusion model."
            )
        some = ", ".join(unmatched[:3])
        return InvalidInput(
            f"none of the {texts + len(unmatched)} tensors of {file.name} match this {self._family} model "
            f"(they begin with {some}); choose a LoRA made for {self._family}. Names that are read: {READ}."
        )


@dataclass(frozen=True)
class _Change:
    """One kind of change of one module, as a file has it; `parts` and `shared` name its tensors."""

    file: LoraFile
    checkpoint: Checkpoint
    written: str
    kind: str
    parts: dict[str, str]
    shared: dict[str, str]

    def patch(self, source: Source) -> Patch:
        """It as a patch of the weight at `source`.

        Raises:
            InvalidInput: a part is missing, empty, or of a form no such change has.
        """
        self._check_parts()
        parts, kind = dict(self.parts), self.kind
        if "dora_scale" in self.shared and kind not in WHOLE:
            parts["dora_scale"] = self.shared["dora_scale"]
        if kind == "oft":
            kind = "boft" if len(self._shape("blocks")) == 4 else "oft"
        return Patch(
            kind="diff" if kind == "bias" else kind,
            tensors={part: FileTensor(self.file, name, self.checkpoint) for part, name in parts.items()},
            strength=1.0,
            alpha=None if kind in WHOLE else self._alpha(),
            offset=None if source.start is None else (0, source.start, source.stop - source.start),
            swapped=source.swap,
        )

    def _shape(self, part: str) -> tuple[int, ...]:
        return self.checkpoint.shapes[self.parts[part]]

    def _check_parts(self) -> None:
        for part, why in REFUSED.items():
            if part in self.parts:
                raise self.refused(why)
        if not any(needed <= self.parts.keys() for needed in NEEDED[self.kind]):
            raise self.refused(f"it has {', '.join(sorted(self.parts))} alone, which is not all of it")
        if self.kind == "oft" and "dora_scale" in self.shared:
            raise self.refused("it is OFT with DoRA")
        for name in (*self.parts.values(), *self.shared.values()):
            shape, number = self.checkpoint.shapes[name], self.checkpoint.dtypes[name]
            if 0 in shape:
                raise self.refused(f"{name} is empty, its shape is {shape}")
            if number not in FLOATS and name != self.shared.get("alpha"):
                raise self.refused(f"{name} holds {number} numbers, not floating point")
        matrices = [] if self.kind in WHOLE else [*self.parts.values(), self.shared.get("dora_scale")]
        for name in matrices:
            if name is not None and len(self.checkpoint.shapes[name]) < 2:
                raise self.refused(f"{name} has shape {self.checkpoint.shapes[name]}, which is no matrix")
        if self.kind == "oft" and len(self._shape("blocks")) not in (3, 4):
            raise self.refused(f"its blocks have shape {self._shape('blocks')}")
        if self.kind == "lora" and self._shape("up")[1] != self._shape("down")[0]:
            raise self.refused(f"its halves have rank {self._shape('up')[1]} and {self._shape('down')[0]}")

    def _alpha(self) -> float | None:
        name = self.shared.get("alpha")
        if name is None:
            return None
        if math.prod(self.checkpoint.shapes[name]) != 1:
            raise self.refused(f"its alpha has shape {self.checkpoint.shapes[name]}, not one number")
        alpha = FileTensor(self.file, name, self.checkpoint).read().item()
        if not math.isfinite(alpha):
            raise self.refused(f"its alpha is {alpha}")
        return alpha

    def refused(self, why: str) -> InvalidInput:
        """The sentence that says so."""
        return InvalidInput(
            f"{self.file.name}: the {self.kind} of {self.written} cannot be applied: {why}; "
            "choose a complete LoRA file made for this model."
        )


def _add(groups: dict[tuple[str, str], dict[str, dict[str, str]]], place: Place, name: str) -> None:
    kinds = groups.setdefault((place.written, place.module), {})
    kinds.setdefault(place.kind, {})[place.part] = name


def _checkpoint(file: LoraFile) -> Checkpoint:
    file.check()
    checkpoint = Checkpoint([Path(file.path)])
    if not checkpoint.shapes:
        raise InvalidInput(f"{file.name} holds no tensors; download it again.")
    return checkpoint


def _check_finite(file: LoraFile, contents: Contents) -> None:
    for patches in contents.weights.values():
        for tensor in (t for patch in patches for t in patch.tensors.values()):
            if not torch.isfinite(tensor.read()).all():
                raise InvalidInput(
                    f"{file.name}: {tensor.name} holds values that are not finite (NaN or infinity); "
                    "the training failed or the file is damaged: choose another one."
                )


def _without_values(patch: Patch) -> dict[str, torch.Tensor]:
    return {part: torch.empty(tensor.shape, device="meta") for part, tensor in patch.tensors.items()}


def _native_shapes(native: dict[str, Source], mapping: dict[str, Source], shapes: Shapes) -> Shapes:
    """Shapes of the weights under native names, of a file in either naming."""
    result: Shapes = {}
    for name, source in native.items():
        rows, *rest = shapes[mapping[name].key]
        if source.stop is not None:  # a piece of a fused weight, which ends where its last piece does
            rows = max(source.stop, *result.get(source.key, (0,))[:1])
        result[source.key] = (rows, *rest)
    return result
