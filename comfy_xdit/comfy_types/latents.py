"""An empty LATENT as the model takes it."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.sample
import torch

from comfy_xdit.comfy_types.model.patcher import RemotePatcher
from comfy_xdit.nodes.surroundings import RATIOS


def fitting(model: RemotePatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT; of an empty one with the channels of the model and, from 0.33 on, its size."""
    fit = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fit).parameters
    ratios = {name: latent[name] for name in RATIOS if name in latent and name in known}
    return fit(model, latent["samples"], **ratios)
