"""What the tests of this folder put into nodes, and how they compare what comes out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.environment import ROOT
from tests import tiny

DEMO = ROOT / "assets" / "demo"
SHIM = Path(__file__).parent / "shim"
# ComfyUI takes a Flux's width from FLUX.1 itself.
FLUX_CONFIG = {
    **tiny.FLUX_CONFIG,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
FAMILIES = ("sd3", "flux")
LAYOUTS = {
    "1rank": {"ulysses_degree": 1},
    "ulysses2": {"ulysses_degree": 2},
    "cfg2": {"cfg_parallel_degree": 2},
}
# Every method of a class in ComfyUI, on two ranks, without pipelines.
METHODS = {
    "cfg": {"cfg_parallel_degree": 2},
    "data": {"data_parallel_degree": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "sharded": {"data_parallel_degree": 2, "shard_weights": True},
    "sharded tokens": {"ulysses_degree": 2, "shard_weights": True},
}
FLUX_BYTES = 12e9  # ComfyUI's copy and the ranks' copies, in fp32


def python_path() -> str:
    """PYTHONPATH of the processes that are started: the shim before what is inherited."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(SHIM), *(path for path in inherited if path and path != str(SHIM))])


def layout(ranks: int = 1, **degrees: int) -> ParallelConfig:
    """A layout of CPU ranks: Ulysses unless degrees are given."""
    return ParallelConfig(**(degrees or {"ulysses_degree": ranks}))


def pair(run_node: Any, name: str, degrees: dict[str, int]) -> SimpleNamespace:
    """The same file loaded by ComfyUI (`stock`) and into ranks of these degrees (`ours`)."""
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout(**degrees)
    )
    return SimpleNamespace(stock=stock, ours=ours)


def random_conditioning(model: Any, seed: int, tokens: int = 12) -> list[Any]:
    """A CONDITIONING of random numbers that fits the transformer of `model`."""
    shapes = {name: tuple(p.shape) for name, p in model.model.diffusion_model.named_parameters()}
    width = next(shapes[name][1] for name in ("context_embedder.weight", "txt_in.weight") if name in shapes)
    pooled_names = ("y_embedder.mlp.0.weight", "vector_in.in_layer.weight")
    pooled_width = next(shapes[name][1] for name in pooled_names if name in shapes)
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, pooled_width, generator=generator)}]]


def conditioning_for(config: dict[str, Any], seed: int, **options: Any) -> list[Any]:
    """As random_conditioning, for the diffusers configuration of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 12, config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=generator)
    return [[context, {"pooled_output": pooled, **options}]]


def empty_latent(batch: int = 1, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
    """A LATENT of zeros, sizes in latent pixels."""
    return {"samples": torch.zeros(batch, 16, height, width)}


def random_latent(batch: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    """The samples of a LATENT that is not empty."""
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(3))


def one_step(run_node: Any, model: Any) -> torch.Tensor:
    """What KSampler makes of nothing in a step, with random prompts."""
    (latent,) = run_node(
        "KSampler",
        model=model,
        seed=1,
        steps=1,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        positive=random_conditioning(model, 1),
        negative=random_conditioning(model, 2),
        latent_image=empty_latent(1, 8, 8),
    )
    return latent["samples"]


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
