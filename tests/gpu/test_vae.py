"""A VAE over ranks that share one device: rows, tiles and the way back, against plain diffusers on it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.vae import RemoteVAE
from tests import vaes
from tests.gpu.device import AS_EXACT, DEVICE, here
from tests.tiny import relative_l2

CLASSES = ("AutoencoderKL", "AutoencoderKLWan")
RANKS = {
    1: ParallelConfig(),
    2: ParallelConfig(ulysses_degree=2),
    4: ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2),
}
ROWS, COLUMNS = 13, 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Each class: the module and its diffusers folder."""
    root, made = tmp_path_factory.mktemp("vaes"), {}
    for name in CLASSES:
        made[name] = vaes.build(name), root / name
        made[name][0].save_pretrained(root / name)
    return made


@pytest.fixture(scope="module", params=RANKS)
def layout(request) -> ParallelConfig:
    """Grouped by pytest, so that each layout's ranks start once."""
    return here(RANKS[request.param])


def remote(folder: Path, layout: ParallelConfig, dtype: str = "default") -> RemoteVAE:
    vae = RemoteVAE(ModelSpec.of(folder, "vae", dtype), layout)
    vae.load()
    return vae


def latent_of(module: nn.Module) -> torch.Tensor:
    """A random picture's, or that of a video of two latent frames."""
    config = module.config
    shape = [1, config.get("z_dim") or config["latent_channels"], ROWS, COLUMNS]
    if "z_dim" in config:
        shape.insert(2, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(
    module: nn.Module, latent: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """By plain diffusers; about -1..1, on CPU."""
    there = copy.deepcopy(module).to(device, dtype)
    return there.decode(latent.to(device, dtype), return_dict=False)[0].float().cpu()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CLASSES)
def test_rows_are_as_exact_as_the_whole(folders, layout, name: str, dtype: str):
    """In fp32 a GPU rounds the factors of its convolutions to TF32, in plain diffusers and in ranks alike."""
    module, folder = folders[name]
    latent, vae = latent_of(module), remote(folder, layout, dtype)
    exact = decoded(module, latent, torch.device("cpu"), torch.float64)
    computed = getattr(torch, vae.info["dtype"])  # on CPU ranks always fp32
    rounding = relative_l2(decoded(module, latent, DEVICE, computed), exact)
    got = vae.decode_unclamped(latent)
    assert relative_l2(got.clamp(-1, 1), exact.clamp(-1, 1)) <= max(1e-5, AS_EXACT * rounding)


def test_tiles_are_those_of_one_rank(folders, layout):
    module, folder = folders["AutoencoderKL"]
    latent = latent_of(module)
    one = remote(folder, here(ParallelConfig())).decode_unclamped(latent, tile=32)
    assert relative_l2(remote(folder, layout).decode_unclamped(latent, tile=32), one) <= 2e-3


def test_pictures_to_latents(folders, layout):
    module, folder = folders["AutoencoderKL"]
    pixels = torch.rand(1, 4 * ROWS, 4 * COLUMNS, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        there = copy.deepcopy(module).to(DEVICE)
        wanted = there.encode((2 * pixels - 1).movedim(-1, 1).to(DEVICE)).latent_dist.mode().cpu()
    assert relative_l2(remote(folder, layout).encode(pixels), wanted) <= 2e-3
