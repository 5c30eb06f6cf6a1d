"""PixArt-Sigma in diffusers' class: its file, and a line in the table of families, are all there is of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layouts import LAYOUTS
from benchmarks.parity import PER_CALL
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.models.pixart import PixArtSigma

CONFIG = {
    "num_attention_heads": 4, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 288, "caption_channels": 40, "patch_size": 2, "sample_size": 128,
    "interpolation_scale": 2, "use_additional_conditions": False,
}  # fmt: skip
FAMILY = PixArtSigma()


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """The module, its diffusers folder and its single file."""
    root, module = tmp_path_factory.mktemp("pixart"), tiny.build(FAMILY, CONFIG)
    module.save_pretrained(root / "folder")
    return module, root / "folder", tiny.write_native(FAMILY, module, CONFIG, root / "pixart.safetensors")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expected(module, x, timestep, context):
    """Plain diffusers."""
    with torch.no_grad():
        (sample,) = module(
            x,
            context,
            timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )
    return sample.chunk(2, 1)[0]


@pytest.mark.parametrize("layout", ["1 rank", "Ulysses 2", "Ring 2", "CFG 2"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_every_layout_is_plain_diffusers(pixart, layout, kind):
    module, folder, file = pixart
    x, context = _random(2, 4, 10, 14, seed=1), _random(2, 9, 40, seed=2)
    timestep = torch.tensor([731.0, 12.0])
    remote = RemoteModel(ModelSpec.of(folder if kind == "folder" else file, "transformer"), LAYOUTS[layout])

    actual = remote.denoise(x, timestep, {"context": context})

    assert tiny.relative_l2(actual, _expected(module, x, timestep, context)) <= PER_CALL


def test_the_ranks_describe_it(pixart):
    description = RemoteModel(ModelSpec.of(pixart[1], "transformer"), LAYOUTS["1 rank"]).described()

    assert (description.family, description.heads, description.blocks) == ("pixart-sigma", 4, 2)
    assert description.sampling.prediction == "epsilon"
    assert [part.name for part in description.prompt] == ["context"]
