"""What is measured on a GPU: published models' sizes, which random weights do not make faster or slower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from tests import tiny
from worker.models.base import ModelFamily
from worker.models.flux.family import Flux
from worker.models.plans.diffusers import PLANS
from worker.models.sd3.family import SD3
from worker.parallel import Plan


@dataclass(frozen=True)
class Shape:
    """One transformer and one call of it.

    Args:
        cls: diffusers' class.
        config: of the published model; `small`: what a machine without a GPU computes in its place.
        latent, few: without the batch, of the call and of the small one.
        text: tokens of the prompt, each of so many numbers.
        family: ours, if the ranks run diffusers' class of it; else the seam alone is measured.
    """

    name: str
    words: str
    cls: str
    config: dict[str, Any]
    small: dict[str, Any]
    latent: tuple[int, ...]
    few: tuple[int, ...]
    text: tuple[int, int]
    family: ModelFamily | None = None

    @property
    def plan(self) -> Plan:
        """Where its tokens are."""
        return PLANS[self.cls]

    def build(self, device: torch.device, dtype: torch.dtype, small: bool) -> nn.Module:
        """With random weights that are made on the device."""
        torch.manual_seed(0)
        with device:
            module = getattr(diffusers, self.cls)(**(self.small if small else self.config))
        return module.to(dtype).eval().requires_grad_(False)


@dataclass
class Call:
    """One call of a model: ComfyUI's arguments, and diffusers' made of them."""

    x: torch.Tensor
    timestep: torch.Tensor
    given: dict[str, torch.Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, module: nn.Module, small: bool) -> Call:
        """Random, on CPU what the host has, on the module's device what diffusers takes."""
        config = dict(module.config)
        device, dtype = module.device, module.dtype
        latent = shape.few if small else shape.latent
        x = torch.randn(1, *latent, generator=torch.Generator().manual_seed(1))
        tokens = 9 if small else shape.text[0]
        if shape.family is not None:
            timestep = torch.full((1,), 0.7 if isinstance(shape.family, Flux) else 700.0)
            given = tiny.conditions(shape.family, config, tokens)
            there = {name: value.to(device) for name, value in given.items()}
            made = shape.family.call(config, x.to(device, dtype), timestep.to(device), there)
            return cls(x, timestep, given, dict(made.kwargs))
        width = config["text_dim"]
        prompt = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(2))
        moved = {"hidden_states": x.to(device, dtype), "encoder_hidden_states": prompt.to(device, dtype)}
        timestep = torch.full((1,), 700.0)
        return cls(x, timestep, {}, moved | {"timestep": timestep.to(device)})

    def run(self, module: nn.Module) -> torch.Tensor:
        """Plain diffusers."""
        return module(**self.kwargs, return_dict=False)[0]


_SD35 = {
    "sample_size": 128, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38,
    "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
    "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
_WAN = {"text_dim": 32, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2}
SHAPES = (
    Shape(
        "FLUX.1-dev", "1024 x 1024, 4,096 + 512 tokens", "FluxTransformer2DModel", {"guidance_embeds": True},
        tiny.FLUX_CONFIG, (16, 128, 128), (16, 8, 8), (512, 4096), Flux(),
    ),
    Shape(
        "SD3.5 large", "1024 x 1024, 4,096 + 154 tokens", "SD3Transformer2DModel", _SD35,
        tiny.SD3_CONFIG, (16, 128, 128), (16, 8, 8), (154, 4096), SD3(),
    ),
    Shape(
        "Wan 2.1 14B", "832 x 480, 81 frames, 32,760 tokens", "WanTransformer3DModel", {},
        _WAN, (16, 21, 60, 104), (16, 2, 4, 6), (512, 4096),
    ),
)  # fmt: skip
