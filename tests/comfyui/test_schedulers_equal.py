"""Our noise levels against those of a real ComfyUI."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import SCHEDULERS
from comfy_xdit.remote.schedulers import sigmas_of

MODULES = ("model_sampling", "samplers")
FAMILIES = {
    "sd3": Sampling("flow", 3.0, 1000.0),
    "flux": Sampling("exponential_flow", 1.15),
    "pixart": Sampling("discrete", prediction="epsilon", betas=(0.0001, 0.02), even_roots=False),
    "v": Sampling("discrete", prediction="v"),
    "v, zero SNR": Sampling("discrete", prediction="v", zero_snr=True),
}


@pytest.fixture(scope="module")
def comfy(comfyui) -> SimpleNamespace:
    """The modules of ComfyUI that are compared."""
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in MODULES})


def _their_sampling(comfy, sampling: Sampling) -> torch.nn.Module:
    theirs = comfy.model_sampling
    if sampling.kind == "exponential_flow":
        model_sampling = theirs.ModelSamplingFlux()
        model_sampling.set_parameters(shift=sampling.shift)
    elif sampling.kind == "discrete":
        first, last = sampling.betas
        schedule = "linear" if sampling.even_roots else "sqrt_linear"  # as ComfyUI calls them
        settings = {"beta_schedule": schedule, "linear_start": first, "linear_end": last}
        settings["zsnr"] = sampling.zero_snr
        model_sampling = theirs.ModelSamplingDiscrete(SimpleNamespace(sampling_settings=settings))
    else:
        model_sampling = theirs.ModelSamplingDiscreteFlow()
        model_sampling.set_parameters(shift=sampling.shift, multiplier=sampling.multiplier)
    return model_sampling


def _their_sigmas(comfy, sampling: Sampling, scheduler: str, steps: int, denoise: float) -> torch.Tensor:
    model_sampling = _their_sampling(comfy, sampling)

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
    assert torch.allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_timesteps_and_shares_of_a_run(comfy, family):
    ours, theirs = FAMILIES[family], _their_sampling(comfy, FAMILIES[family])
    sigmas = torch.cat([theirs.sigmas, theirs.sigmas * 0.99 + 1e-4])
    assert torch.allclose(ours.timesteps(sigmas), theirs.timestep(sigmas).float(), rtol=1e-6)
    for percent in (0.0, 0.001, 0.2, 0.5, 0.97, 1.0):
        assert ours.sigma_at(percent) == pytest.approx(theirs.percent_to_sigma(percent), rel=1e-5)


def test_every_scheduler_of_comfyui_is_here(comfy):
    assert set(comfy.samplers.KSampler.SCHEDULERS) <= set(SCHEDULERS)
