"""Flux where diffusers alone is not what ComfyUI computes: time in low precision, reference latents."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.layouts import LAYOUTS
from benchmarks.parity import PER_CALL
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny

REFERENCES = [(1, 16, 6, 10), (1, 16, 9, 4)]  # the second has half a patch


@pytest.fixture(scope="module", params=("1 rank", "Ulysses 2", "CFG 2"))
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


@pytest.fixture
def flux(tiny_models):
    return tiny_models["flux"]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
@pytest.mark.parametrize("batch", [1, 2])
def test_reference_latents_are_spread_exactly(flux, layout, method, batch):
    x, timestep = _random(batch, 16, 10, 14, seed=1), torch.full((batch,), 0.7)
    latents = [_random(batch, *shape[1:], seed=i) for i, shape in enumerate(REFERENCES)]
    given = tiny.conditions(flux.family, flux.config, 9, batch)
    with_references = given | {"ref_latents": latents, "ref_latents_method": method}
    expected = tiny.reference(flux.family, flux.module, x, timestep, with_references)
    remote = RemoteModel(ModelSpec.of(flux.file, "transformer"), layout)

    actual = remote.denoise(x, timestep, with_references)

    assert actual.shape == x.shape
    assert tiny.relative_l2(actual, expected) <= PER_CALL
    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ref_latents_method": "spiral"}, r"method 'spiral' .*offset, index, uxo"),
        ({"ref_latents": [torch.zeros(1, 4, 8, 8)]}, r"reference latent has shape \(1, 4, 8, 8\)"),
    ],
    ids=["method", "channels"],
)
def test_references_that_are_not_known_are_refused(flux, given, message):
    remote = RemoteModel(ModelSpec.of(flux.file, "transformer"), LAYOUTS["1 rank"])
    given = tiny.conditions(flux.family, flux.config, 9) | {"ref_latents": [torch.zeros(1, 16, 8, 8)]} | given

    with pytest.raises(InvalidInput, match=message):
        remote.denoise(_random(1, 16, 10, 14, seed=1), torch.ones(1), given)


def test_low_precision_does_not_round_the_timestep(flux, layout):
    """0.877 would be 880 of 1000 in bf16. Rounding of everything else stays, and is small beside that."""
    x, timestep = _random(1, 16, 10, 14, seed=1), torch.tensor([0.877])
    given = tiny.conditions(flux.family, flux.config, 9) | {"guidance": torch.tensor([4.0])}  # exact in bf16
    expected = tiny.reference(flux.family, flux.module, x, timestep, given)
    rounded = tiny.reference(flux.family, flux.module, x, torch.tensor([0.880]), given)
    remote = RemoteModel(ModelSpec.of(flux.file, "transformer", "bf16"), layout)

    actual = remote.denoise(x, timestep, given)

    # Of bf16's rounding, which points anywhere, next to nothing lies along the change to step 880.
    along = torch.dot((actual - expected).flatten(), (rounded - expected).flatten())
    assert abs(along) < 0.1 * (rounded - expected).norm() ** 2
    assert tiny.relative_l2(actual, expected) <= 0.01


def test_no_guidance_is_not_some_guidance(flux, layout):
    """Its embedding is left out: as if its last layer gave zeros."""
    x, timestep = _random(1, 16, 10, 14, seed=1), torch.tensor([0.7])
    given = tiny.conditions(flux.family, flux.config, 9)
    without = copy.deepcopy(flux.module)
    for parameter in without.time_text_embed.guidance_embedder.linear_2.parameters():
        parameter.zero_()
    expected = tiny.reference(flux.family, without, x, timestep, given)
    remote = RemoteModel(ModelSpec.of(flux.file, "transformer"), layout)
    unguided = {name: value for name, value in given.items() if name != "guidance"}

    assert tiny.relative_l2(remote.denoise(x, timestep, unguided), expected) <= PER_CALL
    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) > 1e-3
