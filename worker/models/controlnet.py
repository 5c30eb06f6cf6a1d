"""What ControlNets of each family are: diffusers' class, its configuration, and where residuals go."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from comfy_xdit.protocol.controlnet_files import ControlNetKind
from comfy_xdit.protocol.messages import Residuals
from worker.checkpoints import Shapes, Source
from worker.models.base import Call, packed
from worker.models.flux.family import Flux
from worker.models.plans import diffusers as plans
from worker.models.sd3.family import SD3
from worker.parallel import Plan

HINT_WIDTH = 16  # channels inside the layers that take a hint picture, of every published one
Samples = list[torch.Tensor] | None


class ControlNetFamily(ABC):
    """ControlNets for one family of transformers."""

    plan: Plan
    class_name: str  # diffusers'
    # What a config.json says that shapes cannot.
    words: tuple[str, ...] = ("attention_head_dim", "num_attention_heads")

    @abstractmethod
    def config(self, shapes: Shapes, kind: ControlNetKind) -> dict[str, Any]:
        """Arguments of the diffusers class, derived from tensor shapes. Raises KeyError for what lacks."""

    @abstractmethod
    def build(self, config: dict[str, Any]) -> nn.Module:
        """diffusers' ControlNet, without weights."""

    def mapping(self, shapes: Shapes, kind: ControlNetKind, config: dict[str, Any]) -> dict[str, Source]:
        """For every tensor of the diffusers class its source in the file."""
        return {key: Source(key) for key in shapes}

    @abstractmethod
    def kwargs(self, net: nn.Module, call: Call, hint: torch.Tensor, mode: int | None) -> dict[str, Any]:
        """Arguments of the ControlNet in those of the transformer; `hint` as the net takes it."""

    @abstractmethod
    def spread(self, outputs: tuple[Samples, ...], blocks: dict[str, int], net: nn.Module) -> Residuals:
        """A residual per block of the transformer, by place; `blocks` says how many there are at each."""


class SD3ControlNets(ControlNetFamily):
    """diffusers' SD3ControlNetModel, as InstantX publishes them."""

    plan = plans.SD3_CONTROLNET
    class_name = "SD3ControlNetModel"
    words = (*ControlNetFamily.words, "force_zeros_for_pooled_projection")

    def config(self, shapes: Shapes, kind: ControlNetKind) -> dict[str, Any]:
        _, channels, patch, _ = shapes["pos_embed.proj.weight"]
        # The family reads a transformer's last layer too, which has the channels of the first.
        config = SD3().config({**shapes, "proj_out.weight": (patch**2 * channels,)})
        return config | {"force_zeros_for_pooled_projection": True}

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import SD3ControlNetModel

        return SD3ControlNetModel(**config)

    def kwargs(self, net: nn.Module, call: Call, hint: torch.Tensor, mode: int | None) -> dict[str, Any]:
        given = {**call.kwargs, "controlnet_cond": hint}
        if net.config.force_zeros_for_pooled_projection:
            given["pooled_projections"] = torch.zeros_like(given["pooled_projections"])
        return given

    def spread(self, outputs: tuple[Samples, ...], blocks: dict[str, int], net: nn.Module) -> Residuals:
        (samples,) = outputs
        count = blocks["output"]
        spread = [samples[int(i / (count / len(samples)))] for i in range(count - 1)]
        return {"output": [*spread, None]}  # the last block's text goes nowhere, and it gets none


class FluxControlNets(ControlNetFamily):
    """diffusers' FluxControlNetModel: InstantX, Shakker Labs (union too), XLabs."""

    plan = plans.FLUX_CONTROLNET
    class_name = "FluxControlNetModel"
    words = (*ControlNetFamily.words, "axes_dims_rope")

    def config(self, shapes: Shapes, kind: ControlNetKind) -> dict[str, Any]:
        native = kind.naming == "xlabs"
        channels = shapes["img_in.weight" if native else "x_embedder.weight"][1]
        out = "final_layer.linear.weight" if native else "proj_out.weight"
        config = Flux().config({**shapes, out: (channels,)})
        config.pop("out_channels")
        config["num_mode"] = kind.modes or None
        if kind.takes == "pixels":
            config |= {"patch_size": 2, "conditioning_embedding_channels": HINT_WIDTH}
        return config

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import FluxControlNetModel

        with warnings.catch_warnings():  # diffusers' own class uses its own deprecated import
            warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
            return FluxControlNetModel(**config)

    def mapping(self, shapes: Shapes, kind: ControlNetKind, config: dict[str, Any]) -> dict[str, Source]:
        if kind.naming != "xlabs":
            return super().mapping(shapes, kind, config)
        names = {f"controlnet_x_embedder.{part}": f"pos_embed_input.{part}" for part in ("weight", "bias")}
        names |= {key: key for key in shapes if key.startswith(("controlnet_blocks.", "controlnet_single_"))}
        layers = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
        for number, layer in enumerate(layers):  # every second one of the file's is an activation
            for part in ("weight", "bias"):
                names[f"input_hint_block.{layer}.{part}"] = f"input_hint_block.{2 * number}.{part}"
        return Flux().native_mapping(config) | {to: Source(source) for to, source in names.items()}

    def kwargs(self, net: nn.Module, call: Call, hint: torch.Tensor, mode: int | None) -> dict[str, Any]:
        given = {**call.kwargs, "controlnet_cond": hint if net.input_hint_block is not None else packed(hint)}
        net.union = mode is not None  # without a type, as in stock ComfyUI, the prompt has no token for it
        if mode is not None:
            rows = call.kwargs["hidden_states"].shape[0]
            given["controlnet_mode"] = torch.full((rows, 1), mode, device=hint.device)
        return given

    def spread(self, outputs: tuple[Samples, ...], blocks: dict[str, int], net: nn.Module) -> Residuals:
        residuals = {}
        repeat = net.input_hint_block is not None  # as XLabs trains them: one after the other, and again
        for place, samples in zip(("input", "output"), outputs, strict=True):
            if not samples:
                continue
            every = math.ceil(blocks[place] / len(samples))
            round_ = repeat and place == "input"
            residuals[place] = [
                samples[i % len(samples) if round_ else i // every] for i in range(blocks[place])
            ]
        return residuals


CONTROLNETS: dict[str, ControlNetFamily] = {"sd3": SD3ControlNets(), "flux": FluxControlNets()}
