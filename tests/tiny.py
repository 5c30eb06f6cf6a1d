"""Tiny models with random weights in the real file formats, made once per test session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from worker.models.base import ModelFamily
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3

SD3_CONFIG = {
    "sample_size": 32, "patch_size": 2, "in_channels": 16, "num_layers": 3, "attention_head_dim": 64,
    "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 256,
    "pooled_projection_dim": 32, "out_channels": 16, "pos_embed_max_size": 32, "qk_norm": "rms_norm",
}  # fmt: skip
# SD3.5 medium: image tokens of some blocks attend to themselves a second time.
DUAL = {"dual_attention_layers": (0, 1)}
SD35_CONFIG = {**SD3_CONFIG, **DUAL}
FLUX_CONFIG = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 32,
    "guidance_embeds": True, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
# Heads and blocks enough for eight ranks of every method.
WIDE = {
    "sd3": {**SD3_CONFIG, "num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32},
    "flux": {**FLUX_CONFIG, "num_layers": 4, "num_single_layers": 5, "num_attention_heads": 8},
}  # fmt: skip
FLUX_HIDDEN = FLUX_CONFIG["num_attention_heads"] * FLUX_CONFIG["attention_head_dim"]


@dataclass(frozen=True)
class TinyModel:
    """A random model: its family, its diffusers module (the reference), and both file formats."""

    family: ModelFamily
    config: dict[str, Any]
    module: nn.Module
    folder: Path
    file: Path


def write_models(
    root: Path, sd3: dict[str, Any] = SD3_CONFIG, flux: dict[str, Any] = FLUX_CONFIG
) -> dict[str, TinyModel]:
    """One tiny model per architecture, written as a diffusers folder and as a single file."""
    models = {}
    for name, family, config in (
        ("sd3", SD3(), sd3),
        ("sd3.5-medium", SD3(), {**sd3, **DUAL}),
        ("flux", Flux(), flux),
    ):
        module = build(family, config)
        module.save_pretrained(root / name)
        file = write_native(family, module, config, root / f"{name}.safetensors")
        models[name] = TinyModel(family, config, module, root / name, file)
    return models


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights at a scale where every layer matters: at the default some outputs are near zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        std = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval().requires_grad_(False)


def build(family: ModelFamily, config: dict, seed: int = 0) -> nn.Module:
    """The diffusers transformer of the family: the independent reference of every parity test."""
    return randomise(family.build(dict(config)), seed)


def native_state_dict(family: ModelFamily, module: nn.Module, config: dict) -> dict[str, torch.Tensor]:
    """The module's tensors under the names of the original release (inverse of the family's mapping)."""
    ours = module.state_dict()
    native: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, source in family.native_mapping(dict(module.config)).items():
        tensor = ours[name]
        if source.swap:
            first, second = tensor.chunk(2)
            tensor = torch.cat([second, first])
        if source.start is None:
            native[source.key] = tensor.clone()
        else:
            pieces.setdefault(source.key, []).append((source.start, tensor))
    for key, parts in pieces.items():
        native[key] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    return native


def write_native(family: ModelFamily, module: nn.Module, config: dict, file: Path, prefix: str = "") -> Path:
    """Write the single file that ComfyUI's UNETLoader takes."""
    tensors = native_state_dict(family, module, config)
    save_file({prefix + k: v.contiguous() for k, v in tensors.items()}, file)
    return file


def reference(
    family: ModelFamily, module: nn.Module, x: torch.Tensor, timestep: torch.Tensor, given: dict
) -> Any:
    """Plain diffusers on ComfyUI's arguments; `x` has whole patches."""
    call = family.call(dict(module.config), x, timestep, given)
    with torch.no_grad():
        (sample,) = module(**call.kwargs, return_dict=False)
    return family.output(dict(module.config), sample, x)


def conditions(
    family: ModelFamily, config: dict, text: int, batch: int = 1, seed: int = 7
) -> dict[str, torch.Tensor]:
    """Random conditioning as ComfyUI hands it to the transformer."""
    generator = torch.Generator().manual_seed(seed)
    result = {
        "context": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "y": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
    }
    if isinstance(family, Flux) and config["guidance_embeds"]:
        result["guidance"] = torch.full((batch,), 3.5)
    return result


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
