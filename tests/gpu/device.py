"""The device of the tests in this folder, layouts whose ranks share it, and plain diffusers on it."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from benchmarks.parity import SIGMA, multiplier
from comfy_xdit.protocol.parallel import ParallelConfig
from tests import tiny

ON_CPU = os.environ.get("XDIT_GPU_TESTS") == "cpu"  # the same code on CPU ranks
HAS_GPU = torch.cuda.is_available() and not ON_CPU
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
WHY_NOT = "no CUDA device; XDIT_GPU_TESTS=cpu runs on CPU ranks what is the same code there"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A rank may round in another order than one process does, and no worse.
AS_EXACT = 1.5
EXACT = 1e-5
TEXT = 33  # tokens of a prompt: no number of ranks divides them


def here(parallel: ParallelConfig) -> ParallelConfig:
    """The layout with all its ranks on the one device."""
    name = "cuda:0" if HAS_GPU else "cpu"
    return replace(parallel, devices=(name,) * parallel.world_size)


@cache
def _moved(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(DEVICE, dtype)


def inputs(model: tiny.TinyModel, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Latent, timestep and conditions of a call with an odd number of tokens."""
    x = torch.randn(batch, 16, 18, 14, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((batch,), SIGMA * multiplier(model))
    return x, timestep, tiny.conditions(model.family, model.config, TEXT, batch)


def plain(model: tiny.TinyModel, dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    """What plain diffusers gives for `inputs` in `dtype` on the device, on CPU."""
    x, timestep, given = inputs(model, batch)
    given = {name: value.to(DEVICE) for name, value in given.items()}
    module = _moved(model.module, dtype)
    return tiny.reference(model.family, module, x.to(DEVICE, dtype), timestep.to(DEVICE), given).float().cpu()


def exact(model: tiny.TinyModel, batch: int = 2) -> torch.Tensor:
    """The same in fp32."""
    return plain(model, torch.float32, batch)
