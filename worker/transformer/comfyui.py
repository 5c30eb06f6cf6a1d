"""A loaded transformer of ComfyUI's own class, called with exactly the arguments of the host's call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Residuals
from comfy_xdit.protocol.spec import ModelSpec
from worker.models import in_diffusers
from worker.models.comfyui.building import (
    blocks,
    build,
    check_names,
    fill,
    formatted_outline,
    materialise,
    outline,
)
from worker.models.comfyui.detection import Detected, detect, kept_bytes, named, open_file
from worker.models.comfyui.layout import ComfyUILayout, without_others
from worker.models.comfyui.weights import PatchedComfyUI, lora_files
from worker.parallel import (
    Degrees,
    RankGroups,
    ShardedWeights,
    Stage,
)
from worker.patches import LoraFiles, PatchStore
from worker.transformer.batch import OPTIONS, Batch
from worker.transformer.controlnets import NetCall
from worker.transformer.interface import Latents


class ComfyUITransformer:
    """One transformer on this rank's device, of the class that ComfyUI builds for the file."""

    def __init__(self, spec: ModelSpec, groups: RankGroups, degrees: Degrees):
        self._groups, self._degrees, self._path = groups, degrees, spec.path
        self._checkpoint = open_file(spec.path)
        self._weight_dtype, self._whole = spec.weight_dtype, spec.checkpoint
        self._detected = self._detect()
        self._patched: PatchedComfyUI | None = None
        self._pictures: torch.Tensor | None = None  # of the last call that had any
        self.stage: Stage | None = None  # once it is loaded
        self._layout = ComfyUILayout(self.name, self._detected.config.unet_config, spec, groups, degrees)
        self._traits = self._layout.traits
        self._layout.check()
        _ = self._own_outline  # no layout has more stages than it has blocks

    # ------------------------------------------------------------------ what it is

    @cached_property
    def _outline(self) -> Any:
        """ComfyUI's BaseModel of the file, without memory."""
        return outline(self._detect(), self._path)

    @cached_property
    def _own_outline(self) -> nn.Module:
        """Of what this rank has of it."""
        if self._degrees.stages == 1:
            return self._outline.diffusion_model
        own = outline(self._detect(), self._path).diffusion_model
        self._layout.take_own(own)
        return own

    @property
    def name(self) -> str:
        """ComfyUI's name of the class."""
        return type(self._outline.diffusion_model).__name__

    @cached_property
    def loras(self) -> LoraFiles:
        """Reads LoRA files for it."""
        return lora_files(self._outline)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        shards, whole = self._planned_shards, self._bytes
        if shards is None:
            return whole
        return whole - shards.whole_nbytes + shards.nbytes

    @property
    def _bytes(self) -> int:
        tensors = self._detected.tensors
        if self._degrees.stages > 1:
            outside = without_others(self._outline.diffusion_model, self._own_outline)
            tensors = {n: t for n, t in named(self._detected).items() if not n.startswith(outside)}
        return kept_bytes(self._detected, tensors)

    @cached_property
    def _planned_shards(self) -> ShardedWeights | None:
        if self._degrees.shards == 1:
            return None
        detected = self._detected
        module = formatted_outline(self._detect(), self._path)
        # Layers in formats of their own say themselves what each of their tensors is.
        dtype = None if detected.quantised else detected.dtype
        return ShardedWeights(module, blocks(module), self._degrees.shards, dtype)

    def describe(self) -> dict[str, Any]:
        """What the host needs to know, as `ModelDescription.of` reads it. The twin knows the rest."""
        detected, unet = self._detected, self._detected.config.unet_config
        module, latent = self._outline.diffusion_model, detected.config.latent_format
        compression = getattr(latent, "spacial_downscale_ratio", None)  # which old versions do not say
        return ModelDescription(
            family=self.name,
            comfyui=True,
            latent=LatentSpace(latent.latent_channels, latent.latent_dimensions, compression, patch=()),
            sampling=None,
            prompt=(),
            # Guidance that is distilled into a model leaves nothing to spread over two prompts.
            guided=not unet.get("guidance_embed", False),
            rows_apart=self._layout.rows_apart,
            heads=_first(unet, self._traits.heads),
            width=_first(unet, self._traits.width),
            blocks=len(blocks(module)),
            dual=0,
            streams=self._layout.streams,
            text_tokens=self._traits.text_tokens,
            products=self._traits.products,
            parameters=sum(math.prod(t.shape) for t in detected.tensors.values()),
            stored=_name(self._checkpoint.common_dtype()),
            dtype=_name(detected.dtype),
            manual_cast=detected.manual_cast and _name(detected.manual_cast),
            quantised=detected.quantised or detected.packed,
            planned=self._layout.planned,
            not_spread=self._layout.why_not_spread(),
            around=self._traits.around,
            keeping=self._traits.keeping,
            remade=self._traits.remade,
        ).plain()

    def _detect(self) -> Detected:
        return detect(
            self._checkpoint, self._path, self._weight_dtype, self._groups.device, whole=self._whole
        )

    # ------------------------------------------------------------------ weights

    def load(self) -> None:
        """Build the class and copy its weights from the file, tensor after tensor."""
        self._checkpoint.check_unchanged()
        device, detected, sharded = self._groups.device, self._detected, self._degrees.shards > 1
        # Layers in formats of their own are built where they stay.
        large = sharded or detected.packed or (self._degrees.stages > 1 and not detected.quantised)
        module = build(detected, device, without_memory=large)
        self.stage = self._layout.stage(module)
        shards = None
        if sharded:
            # What a layer with a format of its own will have, only an outline knows that was given the file.
            like = formatted_outline(self._detect(), self._path) if detected.quantised else module
            shards = ShardedWeights(like, blocks(like), self._degrees.shards, None)
        elsewhere = tuple(shards.names) if shards else ()
        materialise(module, device, but=elsewhere)
        if shards:
            shards.attach(module, self._groups.shard_group, device)
        for name, tensor in fill(module, detected, self._path, elsewhere):
            shards.write(name, tensor)
        self._checkpoint.check_unchanged()  # half of one file and half of another is neither
        module.eval().requires_grad_(False)
        self._agree_on_dtypes()
        self.module, self._shards = module, shards
        self._spread = self._layout.spread(module)
        known = self._outline.diffusion_model.state_dict().keys()
        self._patched = PatchedComfyUI(module, self._checkpoint, self._detected, shards, self.loras, known)
        if hasattr(module, "_forward"):
            # Wrappers around the call, which `forward` runs, have run on the host (comfy_types/model). As
            # `forward` itself, so that hooks on the module are called.
            object.__setattr__(module, "forward", module._forward)

    def prove(self) -> None:
        """Have it proven that its tokens, or blocks, can be spread as the layout does; on all ranks alike.

        Raises:
            InvalidInput: they cannot be, and why. Nothing was read for it.
        """
        whole = self._outline.diffusion_model
        self._layout.prove(whole)
        if self._degrees.stages > 1:  # a stage reads its own tensors, and all ranks say the same of a file
            check_names(whole, self._detected, self._path)

    def patch(self, name: str, store: PatchStore) -> int:
        """Have the weight patches of one set. Returns how many weights were written."""
        self._forget()
        return self._patched.apply(name, store)

    def _forget(self) -> None:
        """Drop what the class keeps of earlier calls, with other weights or pictures."""
        if self._traits.forget:
            getattr(self.module, self._traits.forget)()

    def _agree_on_dtypes(self) -> None:
        """ComfyUI chooses dtypes by what a device can: on different devices that may be different ones."""
        mine = tuple(str(dtype) for dtype in (self._detected.dtype, self._detected.manual_cast))
        if self._groups.differ("/".join(mine)):
            raise InvalidInput(
                f"ComfyUI computes {self._path} in different dtypes on the devices of this layout (here "
                f"{mine[0]}, cast to {mine[1]}); set weight_dtype to bf16 or fp16, or choose equal devices."
            )

    # ------------------------------------------------------------------ calls

    def not_finite(self) -> InvalidInput:
        """What to say of an output with values that are not finite."""
        return InvalidInput(
            f"ComfyUI's {self.name} of {self._path} gives values that are not finite (NaN or infinity), "
            f"computed in {self._detected.manual_cast or self._detected.dtype}; set weight_dtype to bf16 or "
            "fp32, remove LoRAs, or download the file again."
        )

    def require(self, what: str) -> None:
        """Raise InvalidInput: whatever is asked for here is made for diffusers' classes."""
        raise InvalidInput(
            f"{what} in the ranks needs diffusers' class of a model, and {Path(self._path).name} runs in "
            f"ComfyUI's own ({self.name}). {self._remedy(what)}"
        )

    def _remedy(self, what: str) -> str:
        if in_diffusers(type(self._detected.config).__name__):
            dtype = "Choose" if self._detected.packed else "Set weight_dtype to bf16, or choose"
            return f"{dtype} a safetensors file in fp16 or bf16."
        return f"Use stock nodes instead of {what}."

    def check(
        self,
        x: Latents,
        conditions: dict[str, Any],
        control: Residuals | None = None,
        nets: Sequence[NetCall] = (),
    ) -> dict[str, Any]:
        """The conditions, as they are. Raises InvalidInput for latents that are not finite."""
        if nets:
            self.require("a ControlNet")
        for latent in [x] if isinstance(x, torch.Tensor) else x:
            if not torch.isfinite(latent).all():
                raise InvalidInput(
                    "the latent holds values that are not finite (NaN or infinity); check the node that "
                    "made it."
                )
        return conditions

    def predict_batch(self, batch: Batch) -> Latents:
        """The output of one call, as ComfyUI's class gives it.

        The rows are spread over the branches. One without any computes the first, which costs no time: it
        has the shape of what the others send, and takes part in what they share.
        """
        shard = self._groups.rows(len(batch)) if self._traits.rows_apart(batch.timestep) else None
        if shard is None:
            return self._call(batch)
        own = shard.span(self._groups.branch)
        has_rows = own.start < own.stop
        outputs = self._call(batch.rows(own if has_rows else slice(0, 1)))

        def gathered(output: torch.Tensor) -> torch.Tensor:
            return self._groups.gather_rows(output if has_rows else output[:0], shard)

        return (
            gathered(outputs) if isinstance(outputs, torch.Tensor) else [gathered(part) for part in outputs]
        )

    def predict_plain(self, batch: Batch) -> torch.Tensor:
        """The output for latents and conditions that no BaseModel has cast yet: of a loop in the ranks.

        In a stage of a pipeline a part of the call, and of its tokens.
        """
        dtype = self._detected.manual_cast or self._detected.dtype
        given = replace(batch, x=_cast(batch.x, dtype), conditions=_cast(batch.conditions, dtype))
        return self._call(given).to(batch.x.dtype)

    def image_tokens(self, batch: Batch) -> int:
        """How many tokens of the stream that is cut into patches a call has."""
        return self.stage.length(lambda: self.predict_plain(batch))

    def idle_calls(self, _batches: Sequence[Batch]) -> int:
        """Of a stage: none, as no layout has stages that share their weights."""
        return 0

    def gather_unused(self, calls: int) -> None:
        """Nothing is gathered in a stage."""

    def preprocess(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method returns that ComfyUI calls around the forward."""
        known = self._traits.around
        if method not in known:
            raise InvalidInput(
                f"{method} of {self.name} is not called in the ranks; they know {', '.join(known)}."
            )
        return getattr(self.module, method)(*args, **kwargs)

    def _call(self, batch: Batch) -> Latents:
        given = dict(batch.conditions)
        pictures = self._traits.pictures
        if pictures in given:
            given[pictures] = self._known_pictures(given[pictures])
        parameters = inspect.signature(self.module.forward).parameters
        if batch.control is not None or "control" in parameters:
            spread = self._spread
            given["control"] = spread.residuals(batch.control) if spread else batch.control
        return self.module(batch.x, batch.timestep, **given)

    def _known_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """The very tensor of the last call, if it says the same: every call brings new ones."""
        known = self._pictures
        if known is None or known.shape != pictures.shape or not torch.equal(known, pictures):
            self._forget()
            self._pictures = pictures
        return self._pictures


def _first(config: dict[str, Any], names: Sequence[str]) -> int | None:
    """The first of these that a configuration says; -1 there is to be worked out of others."""
    return next((n for n in map(config.get, names) if isinstance(n, int) and n > 0), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments as BaseModel hands them on: numbers in `dtype`; counts, marks and options as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: part if name == OPTIONS else _cast(part, dtype) for name, part in value.items()}
    return type(value)(_cast(part, dtype) for part in value) if isinstance(value, (list, tuple)) else value
