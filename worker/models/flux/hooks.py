"""What diffusers' Flux does to timestep and guidance, put right by forward hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ExactTime:
    """The timestep stays in fp32, and a call may have no guidance at all.

    diffusers casts the timestep to the model's dtype before it multiplies by 1000: in bf16 873 becomes
    875, another step. ComfyUI multiplies in fp32. (Guidance both multiply in the model's dtype.) And a
    model with guidance embedding cannot be called without guidance, which ComfyUI's
    FluxDisableGuidance asks for: the embedding is then left out of the sum.
    """

    def __init__(self, transformer: nn.Module):
        self._timestep = torch.empty(0)
        self._guided = True
        embed = transformer.time_text_embed
        self._embeds_guidance = hasattr(embed, "guidance_embedder")
        transformer.register_forward_pre_hook(self._remember, with_kwargs=True)
        embed.register_forward_pre_hook(self._in_full_precision)
        if self._embeds_guidance:
            embed.guidance_embedder.register_forward_hook(self._leave_out)

    def _remember(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._timestep = kwargs["timestep"]
        self._guided = kwargs.get("guidance") is not None
        if self._embeds_guidance and not self._guided:
            kwargs = {**kwargs, "guidance": torch.zeros_like(self._timestep)}
        return args, kwargs

    def _in_full_precision(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._timestep.float() * 1000.0, *args[1:])

    def _leave_out(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if self._guided else torch.zeros_like(output)
