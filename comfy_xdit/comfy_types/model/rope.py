"""Which tokens ComfyUI's ScaleROPE moves: the picture alone, or the reference latents with it."""

from __future__ import annotations

import copy
from typing import Any

import comfy.ldm.flux.model
import torch

# Beside scale_x, shift_x ... in `rope_options`: 1.0 where reference latents are scaled and moved too.
REFERENCES = "references"


def with_references(conditions: dict[str, Any], transformer: torch.nn.Module) -> dict[str, Any]:
    """`conditions`, whose rope_options say what this ComfyUI does with reference latents.

    Versions differ, so the class of `transformer` is asked: it is given a small picture with a
    reference latent, and stopped where it has made their positions. Other families have no references.
    """
    if "rope_options" not in conditions or not isinstance(transformer, comfy.ldm.flux.model.Flux):
        return conditions
    moved = float(_moves_references(transformer))
    return conditions | {"rope_options": {**conditions["rope_options"], REFERENCES: moved}}


def _moves_references(transformer: torch.nn.Module) -> bool:
    found: list[torch.Tensor] = []

    def stop(tokens: torch.Tensor, positions: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        found.append(positions)
        return tokens

    asked = copy.copy(transformer)  # shares everything but what is set here
    object.__setattr__(asked, "forward_orig", stop)
    patch = transformer.patch_size
    x = torch.zeros(1, transformer.in_channels // patch**2, patch, patch)
    for options in ({}, {"rope_options": {"shift_x": 1.0}}):
        type(transformer)._forward(
            asked, x, torch.ones(1), torch.zeros(1, 1, 1), ref_latents=[x], transformer_options=options
        )
    still, shifted = (positions[0, -1] for positions in found)  # of the reference's only token
    return not torch.equal(still, shifted)
