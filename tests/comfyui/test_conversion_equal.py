"""Headless noise, masks, latents and prompt weights against those of a real ComfyUI."""

import importlib
import random
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.headless import conversion
from comfy_xdit.protocol.description import LatentSpace
from comfy_xdit.remote.prompt import parse_weights

MODULES = ("latent_formats", "sample", "sampler_helpers", "sd1_clip")
PIECES = ["(", ")", r"\(", r"\)", "cat", " a ", ":", "1.3", ":0.5", "\\"]


@pytest.fixture(scope="module")
def comfy(comfyui) -> SimpleNamespace:
    """The modules of ComfyUI that are compared."""
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in MODULES})


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randn(3, 16, 5, 7, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("batch_index", [None, [0, 1, 2], [4, 1, 1]])
def test_noise(comfy, samples, batch_index):
    theirs = comfy.sample.prepare_noise(samples, 2**40 + 1, batch_index)
    assert torch.equal(conversion.noise_of(samples, 2**40 + 1, batch_index), theirs)


@pytest.mark.parametrize("shape", [(1, 40, 56), (2, 1, 5, 7), (4, 9, 9)])
def test_mask(comfy, samples, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    theirs = comfy.sampler_helpers.prepare_mask(mask, samples.shape, "cpu")
    assert torch.equal(conversion.mask_of({"noise_mask": mask}, samples).expand_as(samples), theirs)


@pytest.mark.parametrize("family", ["SD3", "Flux"])
def test_latent_format(comfy, samples, family):
    theirs = getattr(comfy.latent_formats, family)()
    ours = LatentSpace(16, scale=theirs.scale_factor, mean=(theirs.shift_factor,))
    assert torch.equal(ours.scaled(samples), theirs.process_in(samples))
    assert torch.equal(ours.unscaled(samples), theirs.process_out(samples))


@pytest.mark.parametrize("family", ["Wan21", "Wan22", "Mochi", "HunyuanVideo", "LTXV"])
def test_latent_format_of_videos(comfy, family):
    theirs = getattr(comfy.latent_formats, family)()
    channels, given = theirs.latent_channels, vars(theirs)
    mean, std = (
        tuple(given.get(n, torch.empty(0)).flatten().tolist()) for n in ("latents_mean", "latents_std")
    )
    ours = LatentSpace(channels, theirs.latent_dimensions, scale=theirs.scale_factor, mean=mean, std=std)
    video = torch.randn(2, channels, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours.scaled(video), theirs.process_in(video))
    assert torch.equal(ours.unscaled(video), theirs.process_out(video))


def test_prompt_weights_of_random_texts(comfy):
    """Every text, balanced or not, is cut into the same pieces of the same weight."""
    clip, chance = comfy.sd1_clip, random.Random(0)
    for _ in range(5000):
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 12)))
        theirs = clip.token_weights(clip.escape_important(text), 1.0)
        assert parse_weights(text) == ([(clip.unescape_important(t), w) for t, w in theirs] or [("", 1.0)])
