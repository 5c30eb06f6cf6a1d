"""Every family and file format the ranks read, against the stock loader on the same file."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny
from tests.comfyui.inputs import (
    FLUX_BYTES,
    FLUX_CONFIG,
    conditioning_for,
    empty_latent,
    layout,
    relative_l2,
)
from worker.models.sd3.family import SD3

PER_RUN = 1e-4
# ComfyUI takes an SD3's width for 64 times its layers.
SD3_CONFIG = {**tiny.SD3_CONFIG, "num_layers": 4}
SD35_CONFIG = {**tiny.SD35_CONFIG, "num_layers": 4}


def _check(run_node, name: str, config: dict[str, Any], cfg: float, **options: Any) -> None:
    """KSampler on the stock MODEL, and both samplers on ours with two ranks, agree."""
    settings = {
        "seed": 3,
        "steps": 3,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": conditioning_for(config, 1, **options),
        "negative": conditioning_for(config, 2, **options),
        "latent_image": empty_latent(1, 10, 13),
    }
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    (expected,) = run_node("KSampler", model=stock, **settings)
    (ours,) = run_node("XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout(2))
    for sampler in ("KSampler", "XDiTSampler"):
        (actual,) = run_node(sampler, model=ours, **settings)
        assert relative_l2(actual["samples"], expected["samples"]) <= PER_RUN, sampler


@pytest.fixture
def folder(comfyui) -> Path:
    return comfyui.models / "diffusion_models"


@pytest.mark.parametrize("config", [SD3_CONFIG, SD35_CONFIG], ids=["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "checkpoint"])
def test_sd3_as_released(request, run_node, folder, config, prefix):
    file = folder / f"{request.node.callspec.id}.safetensors"
    tiny.write_native(SD3(), tiny.build(SD3(), config), config, file, prefix)

    _check(run_node, file.name, config, cfg=3.0)


def test_sd3_as_diffusers_writes_it(run_node, folder, tmp_path):
    tiny.build(SD3(), SD3_CONFIG).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(folder / "sd3_diffusers.safetensors")

    _check(run_node, "sd3_diffusers.safetensors", SD3_CONFIG, cfg=3.0)


@pytest.mark.skipif(psutil.virtual_memory().available < FLUX_BYTES, reason="needs 12 GB of free memory")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_flux_as_released(run_node, folder, flux_file, cfg):
    _check(run_node, flux_file.name, FLUX_CONFIG, cfg=cfg, guidance=2.5)
