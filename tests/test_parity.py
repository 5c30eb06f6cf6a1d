"""N ranks against plain diffusers: one call, a 20-step run, and what does not divide."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit.errors import InvalidInput
from comfy_xdit.group import worker_group
from comfy_xdit.messages import Sample
from comfy_xdit.parallel import ParallelConfig
from comfy_xdit.remote import RemoteModel
from comfy_xdit.spec import ModelSpec
from tests import tiny

# fp32: sums in another order (the attention of fewer heads, a batch in two halves) and nothing
# else. The published limits are 1e-5 per call and 1e-4 per 20-step run; both hold with a margin.
PER_CALL, PER_RUN = 1e-5, 1e-4
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses 2": ParallelConfig(ulysses_degree=2),
    "cfg 2": ParallelConfig(cfg_parallel_degree=2),
    "cfg 2 x ulysses 2": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2),
}
# (height, width, text tokens, batch): divisible; odd text; odd image tokens; both; fewer than ranks
SIZES = [(16, 16, 32, 2), (16, 16, 33, 2), (6, 10, 32, 1), (18, 14, 7, 2), (2, 2, 1, 1)]
MODELS = ["sd3", "sd3.5-medium", "flux"]


def timesteps(family: str, sigma: float, batch: int) -> torch.Tensor:
    """What ComfyUI hands to the transformer: sigma for Flux, 1000 sigma for SD3."""
    return torch.full((batch,), sigma if family == "flux" else 1000 * sigma)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_one_call_equals_diffusers(tiny_models, name, layout):
    model = tiny_models[name]
    for source in (model.folder, model.file):
        remote = RemoteModel(ModelSpec.of(source, "transformer"), LAYOUTS[layout])
        for height, width, text, batch in SIZES:
            x = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))
            timestep = timesteps(model.family.name, 0.7, batch)
            given = tiny.conditions(model.family, model.config, text, batch)
            expected = tiny.reference(model.family, model.module, x, timestep, given)
            error = tiny.relative_l2(remote.denoise(x, timestep, given), expected)
            assert error <= PER_CALL, f"{name} {source.name} {layout} {(height, width, text, batch)}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_an_error_would_be_seen(tiny_models, name):
    """The limit separates right from wrong: another text token, or a zeroed one, is far above it."""
    model = tiny_models[name]
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = timesteps(model.family.name, 0.7, 1)
    given = tiny.conditions(model.family, model.config, 8)
    expected = tiny.reference(model.family, model.module, x, timestep, given)
    padded = {**given, "context": torch.nn.functional.pad(given["context"], (0, 0, 0, 1))}
    wrong = tiny.reference(model.family, model.module, x, timestep, padded)
    assert tiny.relative_l2(wrong, expected) > 10 * PER_CALL


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_equal_diffusers(tiny_models, name, layout):
    model = tiny_models[name]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), LAYOUTS[layout])
    multiplier = 1.0 if model.family.name == "flux" else 1000.0
    # Prompts of different length cannot be one batch; an odd one does not divide either.
    positive = tiny.conditions(model.family, model.config, 17, seed=3)
    negative = tiny.conditions(model.family, model.config, 8, seed=4)
    noise = torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(5))
    sigmas = torch.linspace(1.0, 0.0, 21)
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(noise), noise, 3.0, positive, negative, multiplier
    )
    x = noise.clone()
    for i in range(20):
        t = (sigmas[i] * multiplier).expand(1)
        guided = tiny.reference(model.family, model.module, x, t, positive)
        without = tiny.reference(model.family, model.module, x, t, negative)
        x = x + (sigmas[i + 1] - sigmas[i]) * (without + 3.0 * (guided - without))
    steps = []
    latent = remote.sample(request, on_progress=lambda p: steps.append(p.step))
    error = tiny.relative_l2(latent - noise, x - noise)
    assert error <= PER_RUN, f"{name} {layout}: {error:.1e}"
    assert steps == list(range(1, 21))


def test_heads_that_do_not_divide_are_refused(tiny_models):
    model = tiny_models["sd3"]  # 4 heads
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), ParallelConfig(ulysses_degree=3))
    with pytest.raises(InvalidInput, match=r"ulysses_degree 3 does not divide the 4 attention heads.*set"):
        remote.load()
    assert worker_group(remote.parallel).pids, "a refusal must not cost the group"
