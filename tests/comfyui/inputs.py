"""What the tests of this folder put into nodes, and how they compare what comes out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.environment import ROOT
from comfy_xdit.parallel import ParallelConfig

DEMO = ROOT / "assets" / "demo"
SHIM = Path(__file__).parent / "shim"


def python_path() -> str:
    """PYTHONPATH of the processes that are started: the shim before what is inherited."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(SHIM), *(path for path in inherited if path and path != str(SHIM))])


def layout(ranks: int = 1, **degrees: int) -> ParallelConfig:
    """A layout of CPU ranks: Ulysses unless degrees are given."""
    return ParallelConfig(**(degrees or {"ulysses_degree": ranks}))


def random_conditioning(model: Any, seed: int, tokens: int = 12) -> list[Any]:
    """A CONDITIONING of random numbers that fits the transformer of `model`."""
    shapes = {name: tuple(p.shape) for name, p in model.model.diffusion_model.named_parameters()}
    width = next(shapes[name][1] for name in ("context_embedder.weight", "txt_in.weight") if name in shapes)
    pooled_names = ("y_embedder.mlp.0.weight", "vector_in.in_layer.weight")
    pooled_width = next(shapes[name][1] for name in pooled_names if name in shapes)
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, pooled_width, generator=generator)}]]


def empty_latent(batch: int = 1, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
    """A LATENT of zeros, sizes in latent pixels."""
    return {"samples": torch.zeros(batch, 16, height, width)}


def random_latent(batch: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    """The samples of a LATENT that is not empty."""
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(3))


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
