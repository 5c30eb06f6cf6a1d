"""VAEs over 2 and 4 ranks, against plain diffusers in one process."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline, LTX2Pipeline
from torch import nn

from comfy_xdit.protocol.errors import Interrupted, RemoteError
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.vae import RemoteVAE
from tests import vaes
from tests.tiny import relative_l2

TOLERANCE = 1e-5
LAYOUTS = {1: ParallelConfig(), 2: ParallelConfig(ulysses_degree=2),
           4: ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2)}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Every class: the module and its diffusers folder."""
    root, made = tmp_path_factory.mktemp("vaes"), {}
    for name in vaes.CONFIGS:
        module, folder = vaes.build(name), root / name.replace(" ", "-")
        module.save_pretrained(folder)
        made[name] = (module, folder)
    return made


def remote(path: Path, ranks: int) -> RemoteVAE:
    vae = RemoteVAE(ModelSpec.of(path, "vae"), LAYOUTS[ranks])
    vae.load()
    return vae


def socket_latent(
    vae: RemoteVAE, rows: int, columns: int = 6, batch: int = 1, frames: int = 2
) -> torch.Tensor:
    """A random latent, as a LATENT socket holds it."""
    shape = [batch, vae.info["latent_channels"], rows, columns]
    if vae.info["temporal_compression"] is not None:
        shape.insert(2, frames)
    return torch.randn(shape, generator=torch.Generator().manual_seed(rows))


def pictures(vae: RemoteVAE, rows: int, columns: int = 6, batch: int = 1) -> torch.Tensor:
    """Random pictures of so many latent rows, or a video of two latent frames."""
    ratio, time = vae.info["spatial_compression"], vae.info["temporal_compression"]
    shape = [batch, rows * ratio, columns * ratio, 3]
    if time is not None:
        shape.insert(1, 1 + time)
    return torch.rand(shape, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def plain_decode(module: nn.Module, latent: torch.Tensor) -> torch.Tensor:
    """diffusers' pipelines from a LATENT socket's numbers to pictures in 0..1, channels last."""
    if type(module).__name__ == "AutoencoderKLFlux2":
        mean = module.bn.running_mean.view(1, -1, 1, 1)
        deviation = torch.sqrt(module.bn.running_var.view(1, -1, 1, 1) + module.config.batch_norm_eps)
        latent = Flux2Pipeline._unpatchify_latents(latent * deviation + mean)
    elif type(module).__name__ == "AutoencoderKLLTX2Video":
        latent = LTX2Pipeline._denormalize_latents(latent, module.latents_mean, module.latents_std)
    sample = module.decode(latent, return_dict=False)[0]
    return (sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


@torch.no_grad()
def plain_encode(module: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    encoded = module.encode(pixels.movedim(-1, 1) * 2 - 1)
    latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    if type(module).__name__ == "AutoencoderKLFlux2":
        latent = Flux2Pipeline._patchify_latents(latent)
        mean = module.bn.running_mean.view(1, -1, 1, 1)
        return (latent - mean) / torch.sqrt(
            module.bn.running_var.view(1, -1, 1, 1) + module.config.batch_norm_eps
        )
    if type(module).__name__ == "AutoencoderKLLTX2Video":
        return LTX2Pipeline._normalize_latents(latent, module.latents_mean, module.latents_std)
    return latent


@pytest.mark.parametrize("name", sorted(vaes.CONFIGS))
def test_one_rank_is_plain_diffusers(folders: Any, name: str):
    module, folder = folders[name]
    vae = remote(folder, 1)
    latent, pixels = socket_latent(vae, 20), pictures(vae, 20)

    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    assert relative_l2(vae.encode(pixels), plain_encode(module, pixels)) <= TOLERANCE
    edge = 16 * vae.info["spatial_compression"] // vaes.packing(name)
    tiled = vae.decode(latent, tile=edge)
    if name != "AutoencoderKLCogVideoX":  # see below
        assert relative_l2(tiled, plain_decode(vaes.tiled(module, edge), latent)) <= TOLERANCE


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_video_of_pictures(folders: Any, tmp_path: Path, ranks: int):
    """Latte's: its VAE knows pictures, so that every frame is one."""
    module, folder = folders["AutoencoderKL"]
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    vae = remote(tmp_path, ranks)
    latent, pixels = socket_latent(vae, 7, batch=2, frames=3), pictures(vae, 7, batch=2)
    assert (latent.ndim, pixels.ndim) == (5, 5)

    expected = torch.stack([plain_decode(module, frame) for frame in latent.unbind(2)], dim=1)
    assert relative_l2(vae.decode(latent), expected) <= TOLERANCE
    expected = torch.stack([plain_encode(module, frame) for frame in pixels.unbind(1)], dim=2)
    assert relative_l2(vae.encode(pixels), expected) <= TOLERANCE
    assert vae.note == ""


def test_fewer_rows_than_ranks_is_done_by_one_rank_and_said(folders: Any):
    module, folder = folders["AutoencoderKL"]
    vae = remote(folder, 4)
    latent, pixels = socket_latent(vae, 3), pictures(vae, 3)

    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    assert vae.note == "1 of 4 ranks did the work: the latent has 3 rows, one for each rank are needed."
    assert relative_l2(vae.encode(pixels), plain_encode(module, pixels)) <= TOLERANCE
    latent, pixels = socket_latent(vae, 4), pictures(vae, 4)  # one row for each
    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    assert relative_l2(vae.encode(pixels), plain_encode(module, pixels)) <= TOLERANCE
    assert vae.note == ""


# Odd and even numbers of latent rows; 17 and 15 on 4 ranks give bands of two sizes.
# Ranks last, so that a group is started once.
@pytest.mark.parametrize(
    ("name", "rows"),
    [(name, rows) for name in vaes.CONFIGS for rows in (13, 17)]
    + [(name, rows) for name in ("AutoencoderKL", "AutoencoderKLWan") for rows in (15, 18)],
)
@pytest.mark.parametrize("ranks", [4, 2])
def test_rows(folders: Any, name: str, ranks: int, rows: int):
    module, folder = folders[name]
    vae = remote(folder, ranks)
    latent, pixels = socket_latent(vae, rows), pictures(vae, rows)

    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    assert vae.note == ""
    assert relative_l2(vae.encode(pixels), plain_encode(module, pixels)) <= TOLERANCE
    assert vae.note == ""


def test_batch_and_odd_pixels(folders: Any):
    module, folder = folders["AutoencoderKL"]
    vae = remote(folder, 2)
    latent = socket_latent(vae, 7, batch=3)
    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    pixels = pictures(vae, 7, batch=2)
    wider = nn.functional.pad(pixels, (0, 0, 1, 2, 1, 1))  # what exceeds whole places is cut off all around
    assert relative_l2(vae.encode(wider), plain_encode(module, pixels)) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(set(vaes.CONFIGS) - {"AutoencoderKLCogVideoX"}))
def test_tiles_are_those_of_diffusers(folders: Any, name: str):
    """DistVAE's loops, and the dealer for the classes it has none for."""
    module, folder = folders[name]
    ratio = remote(folder, 2).info["spatial_compression"]
    edge, rows, columns = 16 * ratio // vaes.packing(name), 20, 11
    plain = vaes.tiled(module, edge)
    vae = remote(folder, 2)
    latent, pixels = socket_latent(vae, rows, columns), pictures(vae, rows, columns)

    assert relative_l2(vae.decode(latent, tile=edge), plain_decode(plain, latent)) <= TOLERANCE
    assert relative_l2(vae.encode(pixels, tile=edge), plain_encode(plain, pixels)) <= TOLERANCE
    # The tiles were real ones.
    assert relative_l2(vae.decode(latent), plain_decode(plain, latent)) > 100 * TOLERANCE


def test_cogvideox_keeps_its_own_tiles(folders: Any):
    """Its overlaps of 1/6 and 1/5 fit 240 x 360 pixels and little else."""
    module, folder = folders["AutoencoderKLCogVideoX"]
    vae = remote(folder, 2)
    latent = socket_latent(vae, 32, 3, frames=3)
    module.use_tiling = True
    expected = plain_decode(module, latent)
    module.use_tiling = False

    assert relative_l2(vae.decode(latent, tile=512), expected) <= TOLERANCE
    assert vae.note == ""
    assert relative_l2(vae.decode(latent), plain_decode(module, latent)) <= TOLERANCE
    assert vae.note == ""


# ---------------------------------------------------------------------- memory


def _limit_memory(pids: list[int], more: int) -> None:
    """Let processes map `more` bytes beyond what they have: their allocator then really fails."""
    for pid in pids:
        with open(f"/proc/{pid}/statm", encoding="ascii") as pages:
            size = int(pages.read().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))


def test_out_of_memory_is_retried_in_tiles_once(folders: Any):
    module, folder = folders["AutoencoderKL"]
    vae = remote(folder, 1)
    group = worker_group(vae.parallel)
    group.close()  # what other tests left in the allocator would do for memory
    latent = socket_latent(vae, 180, 180)
    vae.decode(latent, tile=256)
    before = list(group.pids)
    # Tiles of 256 pixels were done with 60 to 100 MB more, the whole picture with 400 to 500 MB.
    _limit_memory(group.pids, 220_000_000)
    try:
        pixels = vae.decode(latent)
        assert "ran out of memory with the whole picture, so it was done in tiles of 256 pixels" in vae.note
        with pytest.raises(RemoteError) as caught:  # these tiles are too large, and there is no second retry
            vae.decode(latent, tile=1024)
        assert caught.value.out_of_memory
        assert group.pids == before
    finally:
        group.close()
    assert relative_l2(pixels, plain_decode(vaes.tiled(module, 256), latent)) <= TOLERANCE


def test_out_of_memory_in_one_rank_of_two(folders: Any):
    """The other one waits for it in a collective, so that the retry needs new processes."""
    module, folder = folders["AutoencoderKL"]
    vae = remote(folder, 2)
    group = worker_group(vae.parallel)
    group.close()  # what other tests left in the allocator would do for memory
    vae.decode(socket_latent(vae, 8, 8))
    before = list(group.pids)
    latent = socket_latent(vae, 160, 160)
    _limit_memory(group.pids[1:], 40_000_000)
    try:
        pixels = vae.decode(latent)
        assert vae.note.startswith("rank 1 ran out of memory")
        assert set(group.pids).isdisjoint(before)
    finally:
        group.close()
    assert relative_l2(pixels, plain_decode(vaes.tiled(module, 256), latent)) <= TOLERANCE


# ---------------------------------------------------------------------- interrupt


def test_interrupt_between_blocks(folders: Any):
    module, folder = folders["AutoencoderKL"]
    vae = remote(folder, 2)
    before = list(worker_group(vae.parallel).pids)
    latent = socket_latent(vae, 48, 48)

    with pytest.raises(Interrupted, match="step 0"):  # not even one picture was finished
        vae.decode(latent, interrupted=lambda: True)

    assert worker_group(vae.parallel).pids == before
    small = socket_latent(vae, 6)
    assert relative_l2(vae.decode(small), plain_decode(module, small)) <= TOLERANCE
