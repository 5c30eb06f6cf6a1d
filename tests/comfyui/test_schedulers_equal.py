"""Our noise levels against those of a real ComfyUI."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.remote.schedulers import SCHEDULERS, sigmas_of

MODULES = ("model_sampling", "samplers")
FAMILIES = {
    "sd3": Sampling("discrete_flow", 3.0, 1000.0),
    "flux": Sampling("flux", 1.15, 1.0),
}


@pytest.fixture(scope="module")
def comfy(comfyui) -> SimpleNamespace:
    """The modules of ComfyUI that are compared."""
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in MODULES})


def _their_sigmas(comfy, sampling: Sampling, scheduler: str, steps: int, denoise: float) -> torch.Tensor:
    if sampling.kind == "flux":
        model_sampling = comfy.model_sampling.ModelSamplingFlux()
        model_sampling.set_parameters(shift=sampling.shift)
    else:
        model_sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
        model_sampling.set_parameters(shift=sampling.shift, multiplier=sampling.multiplier)

    class Patcher:
        def get_model_object(self, name: str) -> torch.nn.Module:
            assert name == "model_sampling"
            return model_sampling

    sampler = comfy.samplers.KSampler(Patcher(), steps, torch.device("cpu"), "euler", scheduler, denoise)
    return sampler.sigmas


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equal_to_ksampler(comfy, scheduler, family, steps, denoise):
    theirs = _their_sigmas(comfy, FAMILIES[family], scheduler, steps, denoise)
    if theirs.isnan().any():  # kl_optimal with one step: ComfyUI's result is not a number, ours an error
        with pytest.raises(InvalidInput, match="not defined for 1 step"):
            sigmas_of(FAMILIES[family], scheduler, steps, denoise)
        return
    ours = sigmas_of(FAMILIES[family], scheduler, steps, denoise)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-6


def test_every_scheduler_of_comfyui_is_here(comfy):
    assert set(comfy.samplers.KSampler.SCHEDULERS) <= set(SCHEDULERS)
