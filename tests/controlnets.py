"""Tiny ControlNets with random weights, and what plain diffusers draws with them."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from comfy_xdit.protocol.messages import AppliedControlNet
from comfy_xdit.protocol.spec import ControlNet
from tests import tiny
from worker.models.base import packed, to_whole_patches
from worker.models.flux.family import Flux

PATCH = (2, 2)
SD3 = {**tiny.SD3_CONFIG, "num_layers": 2}
SD35 = {**SD3, "dual_attention_layers": (0,)}
FLUX = {**tiny.FLUX_CONFIG, "num_layers": 1, "num_single_layers": 2}
UNION = {**FLUX, "num_layers": 2, "num_single_layers": 0, "num_mode": 3}
PIXELS = {
    **FLUX,
    "num_layers": 2,
    "num_single_layers": 0,
    "patch_size": 2,
    "conditioning_embedding_channels": 16,
}
# name: (its transformer, class, configuration, seed)
NETS = {
    "sd3": ("sd3", "SD3ControlNetModel", SD3, 11),
    "sd3 again": ("sd3", "SD3ControlNetModel", {**SD3, "num_layers": 3}, 12),
    "sd3.5": ("sd3.5-medium", "SD3ControlNetModel", SD35, 13),
    "flux": ("flux", "FluxControlNetModel", FLUX, 14),
    "flux union": ("flux", "FluxControlNetModel", UNION, 15),
    "flux pixels": ("flux", "FluxControlNetModel", PIXELS, 16),
}


@dataclass(frozen=True)
class TinyNet:
    """A random ControlNet: the diffusers module (the reference), and its file."""

    model: str
    module: nn.Module
    file: Path
    folder: Path

    @property
    def spec(self) -> ControlNet:
        """Its file, for the ranks."""
        return ControlNet.of(self.file)


def build(name: str) -> nn.Module:
    """The diffusers ControlNet: nothing in it is zero, as it would be before training."""
    _, cls, config, seed = NETS[name]
    return made(cls, config, seed)


def made(name: str, config: dict[str, Any], seed: int) -> nn.Module:
    """A ControlNet of one of diffusers' classes with random weights."""
    cls = getattr(importlib.import_module("diffusers"), name)
    with warnings.catch_warnings():  # diffusers' own class uses its own deprecated import
        warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
        return tiny.randomise(cls(**config), seed)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors under diffusers' names."""
    return {key: value.contiguous().clone() for key, value in module.state_dict().items()}


def write_nets(root: Path) -> dict[str, TinyNet]:
    """Each of NETS as a single file and as a diffusers folder."""
    written = {}
    for name, (model, *_) in NETS.items():
        module, folder = build(name), root / name
        module.save_pretrained(folder)
        (root / "files").mkdir(exist_ok=True)
        save_file(tensors(module), root / "files" / f"{name}.safetensors")
        written[name] = TinyNet(model, module, root / "files" / f"{name}.safetensors", folder)
    return written


def xlabs(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a Flux ControlNet for pixels under the names of XLabs' release."""
    ours = module.state_dict()
    config = {**dict(module.config), "num_single_layers": 0}
    native, pieces = {}, {}
    for name, source in Flux().native_mapping(config).items():
        if name not in ours:
            continue
        if source.start is None:
            native[source.key] = ours[name]
        else:
            pieces.setdefault(source.key, []).append((source.start, ours[name]))
    for key, parts in pieces.items():
        native[key] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    layers = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    for part in ("weight", "bias"):
        native[f"pos_embed_input.{part}"] = ours[f"controlnet_x_embedder.{part}"]
        for number, layer in enumerate(layers):
            native[f"input_hint_block.{2 * number}.{part}"] = ours[f"input_hint_block.{layer}.{part}"]
    native |= {key: value for key, value in ours.items() if key.startswith("controlnet_blocks.")}
    return {key: value.contiguous().clone() for key, value in native.items()}


def random(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hint_for(net: TinyNet, x: torch.Tensor, batch: int = 1, seed: int = 9) -> torch.Tensor:
    """A hint as it travels: latents, or a picture in 0..1."""
    if getattr(net.module, "input_hint_block", None) is None:
        return random(batch, *x.shape[1:], seed=seed)
    height, width = to_whole_patches(x, PATCH).shape[-2:]
    return torch.rand(batch, 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(seed))


def applied(net: TinyNet, hint: torch.Tensor, strength: float = 0.8, **more: Any) -> AppliedControlNet:
    """The message for one net."""
    return AppliedControlNet(net.spec, hint, strength, **more)


Called = tuple[TinyNet, torch.Tensor, float, int | None]  # net, hint, strength, mode


def reference(
    model: tiny.TinyModel, x: torch.Tensor, timestep: torch.Tensor, given: dict, *nets: Called
) -> Any:
    """Plain diffusers: each net, the sum of their residuals, and the transformer, on one rank."""
    height, width = x.shape[-2:]
    x = to_whole_patches(x, PATCH)
    call = model.family.call(dict(model.module.config), x, timestep, given)
    sums: list[list[torch.Tensor] | None] = []
    with torch.no_grad():
        for net, hint, strength, mode in nets:
            outputs = _net_outputs(net, call.kwargs, hint, strength, mode, x)
            sums = list(outputs) if not sums else [_add(a, b) for a, b in zip(sums, outputs, strict=True)]
        names = ("block_controlnet_hidden_states",)
        if model.family.name == "flux":
            names = ("controlnet_block_samples", "controlnet_single_block_samples")
        residuals = dict(zip(names, sums, strict=False))
        if any(getattr(net.module, "input_hint_block", None) is not None for net, *_ in nets):
            residuals["controlnet_blocks_repeat"] = True
        (sample,) = model.module(**call.kwargs, **residuals, return_dict=False)
    return model.family.output(dict(model.module.config), sample, x)[..., :height, :width]


def _net_outputs(
    net: TinyNet, kwargs: dict, hint: torch.Tensor, strength: float, mode: int | None, x: torch.Tensor
) -> tuple[list[torch.Tensor] | None, ...]:
    """As diffusers' pipelines call a ControlNet."""
    kwargs, batch = dict(kwargs), x.shape[0]
    hint = hint.expand(batch, -1, -1, -1)
    if type(net.module).__name__ == "SD3ControlNetModel":
        kwargs["pooled_projections"] = torch.zeros_like(kwargs["pooled_projections"])
        kwargs["controlnet_cond"] = to_whole_patches(hint * 1.5305, PATCH)
        return net.module(**kwargs, conditioning_scale=strength, return_dict=False)
    if net.module.input_hint_block is not None:
        kwargs["controlnet_cond"] = hint * 2.0 - 1.0
    else:
        kwargs["controlnet_cond"] = packed(to_whole_patches((hint - 0.1159) * 0.3611, PATCH))
    if mode is not None:
        kwargs["controlnet_mode"] = torch.full((batch, 1), mode)
    return net.module(**kwargs, conditioning_scale=strength, return_dict=False)


def _add(a: list[torch.Tensor] | None, b: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
    if a is None or b is None:
        return b if a is None else a
    return [one + other for one, other in zip(a, b, strict=True)]
