"""The noise levels of a run: what must hold for every schedule, and closed forms where there is one."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import SCHEDULERS
from comfy_xdit.remote.schedulers import sigmas_of

SD3 = Sampling("flow", 3.0, 1000.0)
FLUX = Sampling("exponential_flow", 1.15)
PIXART = Sampling("discrete", prediction="epsilon", betas=(0.0001, 0.02), even_roots=False)
HAVE_SCIPY = importlib.util.find_spec("scipy") is not None
RUNNABLE = [name for name in SCHEDULERS if name != "beta" or HAVE_SCIPY]
SHORTEST = {"kl_optimal": 2}


@pytest.mark.parametrize("sampling", [SD3, FLUX, PIXART], ids=["sd3", "flux", "pixart"])
@pytest.mark.parametrize("scheduler", RUNNABLE)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_falls_from_the_most_noise_to_none(scheduler, sampling, steps):
    sigmas = sigmas_of(sampling, scheduler, max(steps, SHORTEST.get(scheduler, 1)))
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    if scheduler == "ddim_uniform":  # starts below the top, and its stride decides how many steps fit
        assert sampling.sigma_min < sigmas[0] <= sampling.sigma_max
    else:
        assert sigmas[0] == pytest.approx(sampling.sigma_max, rel=1e-5)


@pytest.mark.parametrize("scheduler", [n for n in RUNNABLE if n not in ("beta", "ddim_uniform")])
def test_has_one_level_more_than_steps(scheduler):
    for steps in (2, 5, 20):
        assert len(sigmas_of(SD3, scheduler, steps)) == steps + 1


def test_simple_reads_the_table_in_equal_strides():
    sigmas = sigmas_of(SD3, "simple", 20)
    times = [1.0 - step / 20 for step in range(20)]
    assert sigmas.tolist() == pytest.approx([3 * t / (1 + 2 * t) for t in times] + [0.0], abs=1e-6)


def test_simple_for_flux_follows_the_exponential_shift():
    times = [1.0 - step / 4 for step in range(4)]
    expected = [math.exp(1.15) / (math.exp(1.15) + 1 / t - 1) for t in times]
    assert sigmas_of(FLUX, "simple", 4).tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


def test_normal_shifts_equal_steps_between_both_ends_of_the_table():
    low = 3 * 0.001 / (1 + 2 * 0.001)
    times = [1.0 + (low - 1.0) * step / 19 for step in range(20)]
    expected = [3 * t / (1 + 2 * t) for t in times]
    assert sigmas_of(SD3, "normal", 20).tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


def test_exponential_has_a_constant_ratio_and_karras_a_constant_step_of_the_seventh_root():
    exponential = sigmas_of(SD3, "exponential", 10)[:-1]
    assert (exponential[1:] / exponential[:-1]).std() < 1e-5
    karras = sigmas_of(SD3, "karras", 10)[:-1] ** (1 / 7)
    assert karras.diff().std() < 1e-5


def test_linear_quadratic_is_a_line_in_its_first_half():
    first = sigmas_of(SD3, "linear_quadratic", 20)[:11]
    assert first.diff().std() < 1e-6
    assert 1 - first[-1] == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras"])
def test_denoise_walks_the_end_of_a_longer_schedule(scheduler):
    part = sigmas_of(SD3, scheduler, 12, denoise=0.6)
    assert torch.equal(part, sigmas_of(SD3, scheduler, 20)[-13:])
    assert part[0] < SD3.sigma_max


def test_denoise_zero_is_no_step_at_all():
    assert sigmas_of(SD3, "simple", 20, denoise=0.0).numel() == 0


@pytest.mark.parametrize(
    ("sampling", "given"),
    [
        (PIXART, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        (
            Sampling("discrete", prediction="v"),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_table_is_that_of_diffusers(sampling, given, zero_snr):
    signal = DDIMScheduler(**given, rescale_betas_zero_snr=zero_snr).alphas_cumprod[:-1].double()
    ours = replace(sampling, zero_snr=zero_snr).table
    expected = ((1 - signal) / signal).sqrt()
    assert ((ours[:-1] - expected) / expected).abs().max() < 2e-4  # theirs is a product in single precision


def test_time_and_noise_level_of_a_table_are_inverse():
    times = torch.tensor([0.0, 1.0, 500.0, 999.0])
    assert torch.equal(PIXART.time(PIXART.table[[0, 1, 500, 999]]), times)
    assert torch.allclose(PIXART.sigma(times), PIXART.table[[0, 1, 500, 999]])
    assert PIXART.table[10] < PIXART.sigma(torch.tensor(10.5)) < PIXART.table[11]
    assert torch.equal(PIXART.timesteps(PIXART.table), torch.arange(1000.0))


def test_shares_of_a_run_of_a_table():
    assert PIXART.sigma_at(0.0) > PIXART.sigma_max and PIXART.sigma_at(1.0) == 0.0
    assert PIXART.sigma_at(0.5) == pytest.approx(float(PIXART.table[499:501].log().mean().exp()))


def test_whether_a_run_begins_at_the_most_noise():
    assert PIXART.begins_at_most(sigmas_of(PIXART, "simple", 4))
    assert not PIXART.begins_at_most(sigmas_of(PIXART, "simple", 4, denoise=0.5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((SD3, "cosine", 20), "'cosine' is not one of simple,"),
        ((SD3, "simple", 0), "steps is 0"),
        ((SD3, "simple", 20, 1.5), "denoise is 1.5"),
        ((SD3, "simple", 20, math.nan), "denoise is nan"),
        ((SD3, "kl_optimal", 1), "steps to 2 or more"),
    ],
)
def test_refuses_by_name(arguments, words):
    with pytest.raises(InvalidInput, match=words):
        sigmas_of(*arguments)


def test_an_unknown_kind_of_sampling_is_refused():
    with pytest.raises(InvalidInput, match="'cosine' is not one of flow, exponential_flow, discrete"):
        Sampling("cosine", 1.0, 1000.0)
    for kind, prediction in (("flow", "v"), ("discrete", "flow")):
        with pytest.raises(InvalidInput, match=f"'{kind}' does not go with prediction '{prediction}'"):
            Sampling(kind, prediction=prediction)


@pytest.mark.skipif(HAVE_SCIPY, reason="scipy is installed")
def test_beta_without_scipy_names_it():
    with pytest.raises(InvalidInput, match="pip install scipy"):
        sigmas_of(SD3, "beta", 20)
