"""Tiny IP-Adapters with random weights in the real file formats, and diffusers' own loading of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from safetensors.torch import save_file

from tests import tiny
from worker.models.flux.family import Flux

CLIP, SIGLIP = 48, 40  # widths of what the image encoders give
SIGLIP_TOKENS = 7
RESAMPLER = 64
# diffusers' names within a layer of the resampler: InstantX', of which diffusers knows how to read them.
INSTANTX = {
    "ln0": "0.norm1", "ln1": "0.norm2", "attn.to_q": "0.to_q", "attn.to_kv": "0.to_kv",
    "attn.to_out.0": "0.to_out", "adaln_norm": "1.0", "ff.net.0.proj": "1.1", "ff.net.2": "1.3",
    "adaln_proj": "2.1",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def xlabs(config: dict[str, Any], seed: int, tokens: int = 4) -> Tensors:
    """XLabs' format for FLUX.1."""
    random = torch.Generator().manual_seed(seed)
    width = config["joint_attention_dim"]
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    tensors = _linear("ip_adapter_proj_model.proj", tokens * width, CLIP, random)
    tensors |= _norm("ip_adapter_proj_model.norm", width, random)
    for i in range(config["num_layers"]):
        for part in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
            tensors |= _linear(name, hidden, width, random)
    return tensors


def instantx(config: dict[str, Any], seed: int) -> Tensors:
    """InstantX' format for SD3.5."""
    random = torch.Generator().manual_seed(seed)
    head_dim = config["attention_head_dim"]
    hidden = config["num_attention_heads"] * head_dim
    resampler = IPAdapterTimeImageProjection(
        embed_dim=SIGLIP, output_dim=hidden, hidden_dim=RESAMPLER, heads=1, num_queries=5, timestep_in_dim=32
    )
    tensors = {}
    for name, tensor in tiny.randomise(resampler, seed).state_dict().items():
        is_norm = ".ln" in name or "norm" in name
        value = tensor + 1.0 if is_norm and name.endswith("weight") else tensor
        tensors[f"image_proj.{_instantx_name(name)}"] = value
    for i in range(config["num_layers"] + len(config.get("dual_attention_layers", ()))):
        place = f"ip_adapter.{i}"
        tensors |= _linear(f"{place}.norm_ip.linear", 2 * hidden, RESAMPLER, random)
        for part in ("to_k_ip", "to_v_ip"):  # large: the picture's tokens are among many of the image
            tensors[f"{place}.{part}.weight"] = 4.0 * _linear("", hidden, hidden, random)[".weight"]
        for part in ("norm_q", "norm_k", "norm_ip_k"):
            tensors[f"{place}.{part}.weight"] = _norm("", head_dim, random)[".weight"]
    return tensors


def tensors_for(model: tiny.TinyModel, seed: int) -> Tensors:
    """An adapter that fits, in its family's format."""
    return (xlabs if isinstance(model.family, Flux) else instantx)(model.config, seed)


def write(model: tiny.TinyModel, seed: int, path: Path) -> Path:
    """The same as a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors_for(model, seed).items()}, path)
    return path


def encoded(model: tiny.TinyModel, seed: int = 5, pictures: int = 1) -> SimpleNamespace:
    """What CLIP Vision Encode gives, of random numbers."""
    random = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        image_embeds=torch.randn(pictures, CLIP, generator=random),
        penultimate_hidden_states=torch.randn(pictures, SIGLIP_TOKENS, SIGLIP, generator=random),
    )


def embeds_of(model: tiny.TinyModel, output: SimpleNamespace) -> torch.Tensor:
    """Of that, what the family's adapters take."""
    flux = isinstance(model.family, Flux)
    return output.image_embeds if flux else output.penultimate_hidden_states


def reference(
    model: tiny.TinyModel,
    files: Sequence[Path],
    weights: Sequence[float],
    module: torch.nn.Module | None = None,
) -> torch.nn.Module:
    """Plain diffusers with the adapters, loaded from the files by diffusers' own loader."""
    from diffusers.loaders import FluxIPAdapterMixin, SD3IPAdapterMixin

    module = tiny.build(model.family, model.config) if module is None else module
    if isinstance(model.family, Flux):
        pipeline = type("Pipeline", (FluxIPAdapterMixin,), {"transformer": module})()
        pipeline.load_ip_adapter(
            [str(file.parent) for file in files],
            weight_name=[file.name for file in files],
            subfolder=[""] * len(files),
            image_encoder_pretrained_model_name_or_path=None,
        )
        pipeline.set_ip_adapter_scale([[weight] * model.config["num_layers"] for weight in weights])
    else:
        ((file,), (weight,)) = files, weights
        pipeline = type("Pipeline", (SD3IPAdapterMixin,), {"transformer": module})()
        pipeline.load_ip_adapter(str(file.parent), weight_name=file.name, image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(weight)
    return module.requires_grad_(False)


def call(
    model: tiny.TinyModel,
    module: torch.nn.Module,
    x: torch.Tensor,
    timestep: torch.Tensor,
    given: dict[str, Any],
    embeds: Sequence[torch.Tensor],
    negative: Sequence[bool] = (),
    **residuals: Any,
) -> torch.Tensor:
    """`reference` on ComfyUI's arguments; rows of the negative prompt see zeros. `x` has whole patches."""
    asked = model.family.call(dict(module.config), x, timestep, given)
    seen = 1.0 - torch.tensor(negative or [False] * len(x)).float()
    rows = [torch.einsum("b,n...->bn...", seen, one) for one in embeds]
    pictures = rows if isinstance(model.family, Flux) else rows[0].squeeze(1)
    with torch.no_grad():
        (sample,) = module(
            **asked.kwargs,
            **residuals,
            joint_attention_kwargs={"ip_adapter_image_embeds": pictures},
            return_dict=False,
        )
    return model.family.output(dict(module.config), sample, x)


def _instantx_name(name: str) -> str:
    if not name.startswith("layers."):
        return name
    _, number, path = name.split(".", 2)
    part, kind = path.rsplit(".", 1)
    return f"layers.{number}.{INSTANTX[part]}.{kind}"


def _linear(name: str, rows: int, columns: int, random: torch.Generator) -> Tensors:
    return {
        f"{name}.weight": torch.randn(rows, columns, generator=random) / columns**0.5,
        f"{name}.bias": torch.randn(rows, generator=random) / 10,
    }


def _norm(name: str, width: int, random: torch.Generator) -> Tensors:
    return {
        f"{name}.weight": torch.rand(width, generator=random) + 0.5,
        f"{name}.bias": torch.randn(width, generator=random) / 10,
    }
