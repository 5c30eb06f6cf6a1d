"""What the ranks say of a model: as plain data and back, and the arithmetic of latents."""

import json
from dataclasses import replace

import pytest
import torch

from comfy_xdit.protocol.description import LatentSpace, ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.plain import flatten, rebuild
from tests.described import DESCRIBED

VIDEO = LatentSpace(2, 3, patch=(1, 2, 2), scale=0.5, mean=(1.0, -2.0), std=(4.0, 0.25))


@pytest.mark.parametrize(
    "told",
    [
        DESCRIBED,
        replace(DESCRIBED, latent=VIDEO, sampling=None, prompt=(), around=("told",), remade=("a.b",)),
    ],
)
def test_it_is_the_same_after_the_bridge_and_after_a_json_file(told):
    assert ModelDescription.of(json.loads(json.dumps(told.plain()))) == told
    flat = flatten(told.plain())
    assert ModelDescription.of(rebuild(json.loads(json.dumps(flat.head)), flat.tensors)) == told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d | {"depth": 3}, "(ModelDescription) without nothing and with depth"),
        (lambda d: {k: v for k, v in d.items() if k not in ("heads", "width")}, "without heads, width and"),
        (lambda d: d | {"latent": {"channels": 4}}, "(LatentSpace) without compression, dimensions"),
        (
            lambda d: d | {"sampling": d["sampling"] | {"sigma": 1}},
            "(Sampling) without nothing and with sigma",
        ),
        (lambda d: d | {"prompt": ["context"]}, "(PromptPart) without"),
        (lambda d: None, "without around, beside, blocks"),
    ],
)
def test_another_version_s_words_are_refused_by_name(change, words):
    with pytest.raises(InvalidInput) as error:
        ModelDescription.of(change(DESCRIBED.plain()))
    assert words in str(error.value) and "restart ComfyUI" in str(error.value)


def test_statistics_of_every_channel():
    latent = torch.tensor([9.0, -2.0]).view(1, 2, 1, 1, 1).expand(2, 2, 3, 4, 5)
    scaled = VIDEO.scaled(latent)
    assert scaled[:, 0].unique().item() == (9.0 - 1.0) * 0.5 / 4.0
    assert scaled[:, 1].unique().item() == 0.0
    assert torch.equal(VIDEO.unscaled(scaled), latent)
    assert torch.equal(LatentSpace(2).scaled(latent[:, :, 0]), latent[:, :, 0])


def test_tokens_and_pixels_count_patches_that_are_not_full():
    assert VIDEO.tokens((1, 2, 3, 5, 6)) == 3 * 3 * 3
    assert LatentSpace(16).tokens((1, 16, 5, 6)) == 9
    assert LatentSpace(16).whole_pixels((1, 16, 5, 6)) == (48, 48)


def test_a_latent_fits_by_channels_and_dimensions():
    assert VIDEO.fits(torch.zeros(1, 2, 1, 4, 4))
    assert not VIDEO.fits(torch.zeros(1, 2, 4, 4))
    assert not VIDEO.fits(torch.zeros(1, 4, 1, 4, 4))
    assert VIDEO.shape == "(batch, 2, frames, height, width)"
