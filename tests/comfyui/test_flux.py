"""Flux's own matters before stock ComfyUI: reference latents, guidance switched off, bf16."""

from types import SimpleNamespace

import pytest
import torch

from tests.comfyui.inputs import (
    empty_latent,
    layout,
    pair,
    random_conditioning,
    random_latent,
    relative_l2,
)

# Ten times what is measured: a random model looks little at positions, which is what these nodes change.
PER_RUN = 3e-6


@pytest.fixture
def models(run_node, tiny_flux, degrees) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks."""
    return pair(run_node, tiny_flux, degrees)


def _with(conditioning, **options):
    return [[context, {**given, **options}] for context, given in conditioning]


def _difference(run_node, models, samplers=("KSampler",), **options) -> float:
    """The worst relative L2 of `samplers` with our MODEL to KSampler with the stock one."""
    settings = {
        "seed": 7,
        "steps": 3,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "positive": _with(random_conditioning(models.ours, 1), **options),
        "negative": _with(random_conditioning(models.ours, 2, tokens=9), **options),
        "latent_image": empty_latent(1, 10, 13),
    }
    (expected,) = run_node("KSampler", model=models.stock, **settings)
    return max(
        relative_l2(run_node(sampler, model=models.ours, **settings)[0]["samples"], expected["samples"])
        for sampler in samplers
    )


@pytest.mark.parametrize("method", [None, "offset", "index", "uxo"])
def test_reference_latents(run_node, models, method):
    """Three of them, which the default method puts below and beside one another; odd sizes too."""
    references = [random_latent(1, *size) for size in ((8, 12), (9, 5), (6, 7))]
    options = {} if method is None else {"reference_latents_method": method}

    difference = _difference(
        run_node, models, ("KSampler", "XDiTSampler"), reference_latents=references, **options
    )

    assert difference <= PER_RUN


def test_guidance_switched_off(run_node, models):
    """FluxDisableGuidance."""
    assert _difference(run_node, models, ("KSampler", "XDiTSampler"), guidance=None) <= PER_RUN


def test_positions_scaled_and_shifted(run_node, comfyui, models):
    """ScaleROPE, beside a reference latent, which it moves in some versions and leaves in others."""
    if "ScaleROPE" not in comfyui.mappings:
        pytest.skip("this ComfyUI has no ScaleROPE")
    references = [random_latent(1, 8, 12)]
    before = _difference(run_node, models, reference_latents=references)
    scale = {"scale_x": 1.7, "shift_x": 3.0, "scale_y": 0.6, "shift_y": -2.0, "scale_t": 1.0, "shift_t": 1.5}
    scaled = SimpleNamespace(
        stock=run_node("ScaleROPE", model=models.stock, **scale)[0],
        ours=run_node("ScaleROPE", model=models.ours, **scale)[0],
    )

    samplers = ("KSampler", "XDiTSampler")
    unscaled = SimpleNamespace(stock=scaled.stock, ours=models.ours)
    effect = _difference(run_node, unscaled, reference_latents=references)
    assert max(before, _difference(run_node, scaled, samplers, reference_latents=references)) <= PER_RUN
    assert effect > 10 * PER_RUN


@pytest.mark.parametrize("guidance", [4.0, 3.5, None], ids=str)
def test_bf16_is_as_near_as_two_roundings_are(run_node, models, tiny_flux, degrees, comfyui, guidance):
    """Ours and stock's differ by no more than bf16 itself moves stock, and not in another timestep."""
    import comfy.sd

    path = str(comfyui.models / "diffusion_models" / tiny_flux)
    stock = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_flux, weight_dtype="bf16", parallel=layout(**degrees)
    )
    ours.model.diffusion_model.dtype = torch.bfloat16  # a CPU host would send fp32
    ((context, options),) = random_conditioning(ours, 1)
    x, sigma = random_latent(1, 10, 14).bfloat16().float(), 0.877

    def velocity(patcher, dtype: torch.dtype, time: float = sigma) -> torch.Tensor:
        patcher.patch_model(load_weights=False)
        patcher.model.manual_cast_dtype = dtype
        # ComfyUI multiplies guidance by 1000 in the model's dtype; in fp32 it is given what comes out.
        strength = None if guidance is None else torch.tensor([guidance]).bfloat16() * 1000.0
        given = {} if strength is None else {"guidance": torch.tensor([guidance])}
        if given and dtype == torch.float32:
            given = {"guidance": strength.float() / 1000.0}
        times = torch.tensor([time])
        with torch.inference_mode():
            denoised = patcher.model.apply_model(
                x,
                times,
                c_crossattn=context.bfloat16(),
                y=options["pooled_output"].bfloat16(),
                transformer_options={},  # the default is one dict for all, in which stock Flux leaves notes
                **given,
            )
        return (x - denoised) / time

    exact, theirs = velocity(stock, torch.float32), velocity(stock, torch.bfloat16)
    actual, elsewhere = velocity(ours, torch.bfloat16), velocity(stock, torch.float32, 0.880)

    # Two roundings of one value, each as far from it as `theirs`, are sqrt(2) as far apart if they
    # have nothing in common. diffusers by itself computes step 880, which is several times that.
    rounding = relative_l2(theirs, exact)
    assert relative_l2(actual, theirs) <= 1.5 * rounding
    assert relative_l2(elsewhere, exact) > 2 * rounding
    along = torch.dot((actual - theirs).flatten(), (elsewhere - exact).flatten())
    assert abs(along) < 0.1 * (elsewhere - exact).norm() ** 2
