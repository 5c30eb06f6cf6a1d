"""Patches (LoRA and its kin) on the weights of ComfyUI's own class, whose names they use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from comfy_xdit.protocol.messages import Patch
from worker.checkpoints import Checkpoint, Source
from worker.models.comfyui.detection import Detected, Tensors, named
from worker.models.comfyui.formats import unpatched
from worker.parallel import ShardedWeights
from worker.patches import (
    COMPUTE_DTYPE,
    WRITTEN_WITH_DOTS,
    WRITTEN_WITH_UNDERSCORES,
    LoraFiles,
    LoraNames,
    PatchedModel,
    PatchStore,
    Weights,
    patched,
)

PREFIX = "diffusion_model."  # what ComfyUI calls a transformer's weights by, outside of it


def lora_files(outline: Any) -> LoraFiles:
    """Reads LoRA files in every naming that ComfyUI itself knows for this model.

    Args:
        outline: its BaseModel over meta tensors.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in outline.diffusion_model.state_dict().items()}
    native = {name: Source(name) for name in shapes}
    further = {}
    for written, target in comfy.lora.model_lora_keys_unet(outline, {}).items():
        key, *place = (target,) if isinstance(target, str) else target
        name = key.removeprefix(PREFIX)
        start, stop = None, None
        if place and place[0] is not None:
            dim, start, length = place[0]
            stop = start + length
        if written.startswith(WRITTEN_WITH_UNDERSCORES) or name not in native or (place and place[0] and dim):
            continue
        for prefix in WRITTEN_WITH_DOTS:
            written = written.removeprefix(prefix)
        weight = written if written.endswith(".weight") else f"{written}.weight"
        if weight not in native:
            further[weight] = Source(name, start, stop)
    return LoraFiles(type(outline.diffusion_model).__name__, LoraNames(native, further), shapes)


class PatchedComfyUI(PatchedModel):
    """The weights of a ComfyUI class, patched as ComfyUI patches them: added in fp32, rounded as it rounds.

    Its base is read from the file again; a weight that stays packed is patched whenever it is unpacked.

    Args:
        module: the loaded transformer, written to.
        checkpoint: the file, which `detected` has views of.
        shards: what this rank has of some of the weights only.
        known: names of weights of the whole model, also of those that other stages have.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        detected: Detected,
        shards: ShardedWeights | None,
        loras: LoraFiles,
        known: Iterable[str],
    ):
        self._module, self._checkpoint, self._detected, self._shards = module, checkpoint, detected, shards
        names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        super().__init__(names | set(known), names, loras)

    def write(self, changed: list[str], wanted: Weights, store: PatchStore) -> Iterator[str]:
        """As of PatchedModel."""
        if changed:
            self._checkpoint.check_unchanged()  # what was written into the file is seen through the views
        base = named(self._detected) if changed else {}
        for name in changed:
            owner, _, leaf = name.rpartition(".")
            patches = wanted.get(name, ())
            if hasattr(base[name], "change"):
                self._patch_packed(name, patches, store)
            elif hasattr(self._module.get_submodule(owner), f"set_{leaf}"):
                self._write_format(name, base, patches, store)
            else:
                self._write_plain(name, base[name], patches, store)
            yield name

    def _patch_packed(self, name: str, patches: tuple[Patch, ...], store: PatchStore) -> None:
        """Of a PackedWeight: its patches stay on its device."""
        weight = comfy.utils.get_attr(self._module, name)
        tensors = [store.tensors(patch, weight.device) for patch in patches]

        def change(numbers: torch.Tensor) -> torch.Tensor:
            order = iter(tensors)
            return patched(name, numbers, patches, lambda _patch: next(order))

        weight.change = change if patches else None

    def _write_plain(
        self, name: str, base: torch.Tensor, patches: tuple[Patch, ...], store: PatchStore
    ) -> None:
        place = self._shards.places.get(name) if self._shards else None
        own = None if place else comfy.utils.get_attr(self._module, name)
        dtype, device = (place.dtype, self._shards.device) if place else (own.dtype, own.device)
        # To the dtype of the loaded weight first: that is what ComfyUI patches.
        whole = base.to(device, dtype)
        if patches:
            whole = _patched(name, whole.to(COMPUTE_DTYPE, copy=True), patches, store)
            whole = comfy.float.stochastic_rounding(whole, dtype, seed=_seed(name))
        if place:
            self._shards.write(name, whole)
        else:
            own.copy_(whole)

    def _write_format(self, name: str, base: Tensors, patches: tuple[Patch, ...], store: PatchStore) -> None:
        """Of a layer that keeps its weight in a format of its own: by ComfyUI's conversion, and back."""
        owner, _, leaf = name.rpartition(".")
        layer = self._module.get_submodule(owner)
        fresh = unpatched(layer, owner, base)
        if patches:
            weight = getattr(fresh, leaf).to(COMPUTE_DTYPE, copy=True)
            whole = getattr(fresh, f"convert_{leaf}")(weight, inplace=True)
            whole = _patched(name, whole, patches, store)
            getattr(fresh, f"set_{leaf}")(whole, inplace_update=False, seed=_seed(name))
        if self._shards and name in self._shards.names:
            self._shards.write(name, getattr(fresh, leaf))
        else:
            setattr(layer, leaf, getattr(fresh, leaf))


def _patched(name: str, whole: torch.Tensor, patches: tuple[Patch, ...], store: PatchStore) -> torch.Tensor:
    return patched(name, whole, patches, lambda patch: store.tensors(patch, whole.device))


def _seed(name: str) -> int:
    """What ComfyUI's stochastic rounding of a patched weight begins with."""
    here = comfy.utils if hasattr(comfy.utils, "string_to_seed") else comfy.model_patcher  # before 0.33
    return here.string_to_seed(f"{PREFIX}{name}")
