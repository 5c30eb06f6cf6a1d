"""A group norm over bands of rows in two processes, against PyTorch's in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distvae.utils import ParallelContext
from torch import multiprocessing, nn

from tests.tiny import relative_l2
from worker.vae.rows import ROW, RowGroupNorm

CHANNELS, GROUPS, ROWS, FIRST = 64, 8, 33, 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _norm() -> nn.GroupNorm:
    norm = nn.GroupNorm(GROUPS, CHANNELS, eps=1e-6)
    generator = torch.Generator().manual_seed(2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm.requires_grad_(False)


def _input(dtype: torch.dtype) -> torch.Tensor:
    """Two pictures; channels far from zero, as deep in a decoder, and one group that hardly varies."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, ROWS, 30, generator=generator)
    x = x + 5 * torch.randn(1, CHANNELS, 1, 1, generator=generator)
    x[:, : CHANNELS // GROUPS] = 100.0
    x[0, 0, 0, 0] = 101.0
    return x.to(dtype)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    context = ParallelContext(dist.group.WORLD, rank, 2, ROW)
    for name, dtype in DTYPES.items():
        band = _input(dtype)[:, :, FIRST:] if rank else _input(dtype)[:, :, :FIRST]
        torch.save(RowGroupNorm(_norm().to(dtype), context)(band), f"{folder}/{name}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each rank's band in every dtype."""
    folder = tmp_path_factory.mktemp("rows")
    multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", DTYPES)
def test_bands_are_as_exact_as_the_whole(results: Path, name: str):
    dtype = DTYPES[name]
    x, norm = _input(dtype), _norm().to(dtype)
    exact = F.group_norm(x.double(), GROUPS, norm.weight.double(), norm.bias.double(), norm.eps)
    bands = torch.cat([torch.load(results / f"{name}.{rank}") for rank in range(2)], dim=ROW)
    assert bands.dtype == dtype
    whole = relative_l2(norm(x), exact)
    # Statistics that were rounded to bf16 on the way made this 1.6 times the error of the whole.
    assert relative_l2(bands, exact) <= max(1.1 * whole, 1e-6)
