"""Runs of models that predict the noise or v, and of videos, in the ranks' loop, on diffusers' classes.

The reference is diffusers' DDIM scheduler, which is written for alphas instead of noise levels, and formulas
by hand.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import nn

import worker.models
from comfy_xdit.protocol.description import LatentSpace, ModelDescription, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import ModelSpec
from tests import plan_cases, tiny
from worker.checkpoints import Shapes, Source
from worker.models.base import Call, ModelFamily
from worker.models.plans.diffusers import PLANS
from worker.parallel.groups import Degrees, RankGroups
from worker.sampling.guidance import Guidance
from worker.sampling.loops import sample
from worker.sampling.patch_sampler import PatchSampler
from worker.sampling.prediction import PREDICTIONS, Epsilon, Flow, Velocity
from worker.sampling.samplers import Sampler, schedule
from worker.transformer.transformer import Transformer

PER_RUN = 1e-5  # relative L2
STEPS = 5
CFG = 3.0


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- the formulas by themselves


@pytest.mark.parametrize("sigma", [0.3, 7.0])
def test_a_model_that_is_right_gives_the_latent_back(sigma):
    """Each kind by its definition: of the noise, of v = alpha noise - beta latent, of noise - latent."""
    latent, noise, level = random(2, 4, 5, 6, seed=1), random(2, 4, 5, 6, seed=2), torch.tensor(sigma)
    alpha, beta = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    right = {Epsilon(): noise, Velocity(): alpha * noise - beta * latent, Flow(): noise - latent}
    for prediction, output in right.items():
        x = prediction.noised(level, noise, latent)
        assert tiny.relative_l2(prediction.denoised(x, level, output), latent) < 1e-5
        mixed = x if isinstance(prediction, Flow) else alpha * latent + beta * noise
        assert tiny.relative_l2(prediction.inputs(x, level), mixed) < 1e-6


def test_at_the_most_noise_the_transformer_gets_noise_alone():
    noise, level = random(1, 4, 5, 6, seed=2), torch.tensor(14.6)
    for prediction in (Epsilon(), Velocity()):
        start = prediction.noised(level, noise, torch.zeros_like(noise), most=True)
        assert torch.allclose(prediction.inputs(start, level), noise, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_patches_that_run_by_themselves_make_the_whole_run(tmp_path, prediction):
    """PipeFusion's samplers, with a model that looks at each element by itself."""
    latent, noise = random(2, 4, 3, 5, 7, seed=1), random(2, 4, 3, 5, 7, seed=2)
    mask = (random(1, 1, 3, 5, 7, seed=3) > 0).float()
    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0])
    request = Sample(
        ModelSpec(str(tmp_path), "transformer"), "heun", sigmas, latent, noise, CFG, {}, {}, sigmas, mask,
        prediction=prediction, most=True,
    )  # fmt: skip

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.cos(), x.sin()])

    guidance = Guidance.of(request)
    run = Sampler("heun", guidance.start(sigmas[0]), sigmas)
    while (asked := run.wanted) is not None:
        run.advance(guidance.denoised(asked.x, asked.sigma, model(guidance.inputs(asked.x, asked.sigma))))

    places = [torch.arange(start, latent[0].numel(), 3) for start in range(3)]
    patches = PatchSampler(request, places)
    result = torch.empty_like(latent).flatten(1)
    for patch, own in enumerate(places):
        for _ in schedule("heun", sigmas):
            patches.advance(patch, model(patches.inputs(patch)))
        result[:, own] = patches.result(patch)
    assert torch.allclose(result.view_as(run.x), run.x, atol=1e-6)
    assert tiny.relative_l2(run.x, guidance.start(sigmas[0])) > 0.01


# ---------------------------------------------------------------------- whole runs, one rank in this process


def opened(path: Any) -> tuple[Transformer, RankGroups]:
    groups = RankGroups(SimpleNamespace(rank=0, world_size=1), Degrees(1, 1, 1, 1), torch.device("cpu"))
    model = Transformer(ModelSpec.of(path, "transformer"), groups, groups.degrees)
    model.load()
    return model, groups


class Steps:
    """What a loop tells its rank."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor | None] = []

    def step(self, step: int, steps: int, preview: torch.Tensor | None) -> None:
        self.shown.append(preview)


def ran(model: Transformer, groups: RankGroups, request: Sample) -> torch.Tensor:
    run = Steps()
    with torch.inference_mode():
        result = sample(request, model, groups, run)
    assert len(run.shown) == len(request.sigmas) - 1
    return result


def scheduler(prediction: str, sampling: Sampling) -> DDIMScheduler:
    """With the table of `sampling`, which tests/test_schedulers.py compares: its own is single precision."""
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        timestep_spacing="trailing",
    )  # fmt: skip
    made.alphas_cumprod = 1 / (1 + sampling.table.double() ** 2)
    made.set_timesteps(STEPS)
    return made


@pytest.mark.parametrize(
    ("prediction", "zero_snr", "image"),
    [("epsilon", False, False), ("epsilon", False, True), ("v", False, False), ("v", True, False)],
    ids=["epsilon", "epsilon, a picture", "v", "v, zero SNR"],
)
def test_a_run_with_guidance_is_that_of_diffusers_ddim(tiny_models, prediction, zero_snr, image):
    model = tiny_models["sd3"]
    sampling = Sampling("discrete", prediction=prediction, zero_snr=zero_snr)
    steps = scheduler(prediction, sampling)
    sides = [tiny.conditions(model.family, model.config, n, seed=n) for n in (7, 12)]
    noise, latent = random(1, 16, 6, 8, seed=3), random(1, 16, 6, 8, seed=4) * image
    times = steps.timesteps[2:] if image else steps.timesteps  # from the middle
    alpha = steps.alphas_cumprod[times[0]]
    x = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise if image else noise
    for time in times:
        outputs = [
            tiny.reference(model.family, model.module, x.float(), time.float().expand(1), given)
            for given in sides
        ]
        guided = outputs[1] + CFG * (outputs[0] - outputs[1])
        x = steps.step(guided, time, x).prev_sample

    sigmas = torch.cat([sampling.table[times], torch.zeros(1)])
    request = Sample(
        ModelSpec.of(model.file, "transformer"), "euler", sigmas, latent, noise, CFG, *sides,
        sampling.timesteps(sigmas), prediction=prediction, most=not image,
    )  # fmt: skip
    actual = ran(*opened(model.file), request)

    assert torch.equal(request.timesteps[:-1], times.float())
    # Noise of 4,518 times a latent leaves single precision, and ComfyUI's formula, so few digits of it.
    assert tiny.relative_l2(actual, x) <= (1e-4 if zero_snr else PER_RUN)
    other = "v" if prediction == "epsilon" else "epsilon"
    assert tiny.relative_l2(ran(*opened(model.file), replace(request, prediction=other)), x) > 0.01


def test_another_prediction_is_refused(tiny_models):
    model, groups = opened(tiny_models["sd3"].file)
    given = tiny.conditions(tiny_models["sd3"].family, tiny_models["sd3"].config, 7)
    x, sigmas = random(1, 16, 4, 4, seed=1), torch.tensor([1.0, 0.0])
    request = Sample(
        ModelSpec.of(tiny_models["sd3"].file, "transformer"), "euler", sigmas, x, x, 1.0, given, None, sigmas,
        prediction="sample",
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=f"'sample' is not one of {', '.join(PREDICTIONS)}"):
        ran(model, groups, request)


# ---------------------------------------------------------------------- a class of videos

WAN = plan_cases.CASES["Wan 2.1 T2V"]
MEAN, STD = (0.1, -0.4, 0.2, 0.3), (2.0, 0.5, 1.5, 3.0)


class Wan(ModelFamily):
    """diffusers' Wan, as far as these runs need it."""

    name, native = "wan", "never.weight"
    configurations = frozenset({"WAN21_T2V"})
    plan = PLANS["WanTransformer3DModel"]
    text_tokens, products = 512, 16.0
    control: ClassVar = {}
    conditions = frozenset({"context"})

    def detect(self, shapes: Shapes) -> bool:
        return "blocks.0.attn2.norm_k.weight" in shapes

    def config(self, shapes: Shapes) -> dict[str, Any]:
        return dict(WAN.build().config)

    def build(self, config: dict[str, Any]) -> nn.Module:
        return WAN.build()

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        return {}

    def sampling(self, config: dict[str, Any]) -> Sampling:
        return Sampling("flow", shift=8.0, multiplier=1000.0)

    def latent(self, config: dict[str, Any]) -> LatentSpace:
        return LatentSpace(4, 3, patch=(1, 2, 2), mean=MEAN, std=STD)

    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        return (PromptPart("context"),)

    def call(self, config: dict, x: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> Call:
        context = self.tensor(conditions, "context", config["text_dim"])
        kwargs = {"hidden_states": x, "encoder_hidden_states": context, "timestep": timestep}
        return Call(kwargs, self.latent(config).tokens(x.shape))

    def output(self, config: dict, sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return sample


@pytest.fixture
def wan(tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.setattr(worker.models, "FAMILIES", (Wan(),))
    module = WAN.build()
    save_file({name: t.contiguous() for name, t in module.state_dict().items()}, tmp_path / "wan.safetensors")
    return SimpleNamespace(module=module, file=tmp_path / "wan.safetensors")


def video(wan: SimpleNamespace, **changes: Any) -> Sample:
    """Three frames of odd sides."""
    noise, latent = random(1, 4, 3, 5, 7, seed=1), torch.zeros(1, 4, 3, 5, 7)
    sides = [{"context": random(1, n, 32, seed=n)} for n in (6, 6)]
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.0])
    request = Sample(
        ModelSpec.of(wan.file, "transformer"), "euler", sigmas, latent, noise, CFG, *sides, sigmas * 1000
    )
    return replace(request, **changes)


def by_hand(wan: SimpleNamespace, asked: Sample) -> torch.Tensor:
    """Euler's method on the velocity; the frames that a mask keeps are put in before each step."""
    mask = torch.ones_like(asked.noise) if asked.mask is None else asked.mask.expand(asked.noise.shape)
    x = asked.noise * asked.sigmas[0] + asked.latent * (1 - asked.sigmas[0])
    with torch.no_grad():
        for i in range(len(asked.sigmas) - 1):
            sigma, following = asked.sigmas[i], asked.sigmas[i + 1]
            x = torch.where(mask > 0, x, sigma * asked.noise + (1 - sigma) * asked.latent)
            padded = torch.cat([x, x[..., :1]], -1)
            padded = torch.cat([padded, padded[..., :1, :]], -2)
            positive, negative = (
                wan.module(padded, timestep=(sigma * 1000).expand(1), encoder_hidden_states=side["context"])
                .sample[..., :5, :7]
                for side in (asked.positive, asked.negative)
            )  # fmt: skip
            x = x + (negative + CFG * (positive - negative)) * (following - sigma)
    return torch.where(mask > 0, x, asked.latent)


def test_a_video_of_odd_sides(wan):
    asked = video(wan)
    actual, expected = ran(*opened(wan.file), asked), by_hand(wan, asked)
    assert actual.shape == (1, 4, 3, 5, 7)
    assert tiny.relative_l2(actual, expected) <= PER_RUN
    assert tiny.relative_l2(actual, asked.noise) > 0.1


def test_frames_of_a_video_are_kept(wan):
    mask = torch.ones(1, 1, 3, 5, 7)
    mask[:, :, 0] = 0.0
    latent = random(1, 4, 3, 5, 7, seed=9)
    asked = video(wan, latent=latent, mask=mask)
    actual = ran(*opened(wan.file), asked)
    assert torch.allclose(actual[:, :, 0], latent[:, :, 0], atol=1e-5)
    assert tiny.relative_l2(actual, by_hand(wan, asked)) <= PER_RUN


def test_a_class_of_videos_is_described(wan):
    told = ModelDescription.of(opened(wan.file)[0].describe())
    assert (told.latent.dimensions, told.latent.patch, told.streams) == (3, (1, 2, 2), ("image",))
    assert (told.latent.mean, told.latent.std, told.products) == (MEAN, STD, 16.0)
    assert (told.heads, told.width, told.blocks) == (4, 64, 2)


def test_a_picture_is_no_video(wan):
    with pytest.raises(InvalidInput, match=r"wan takes \(batch, 4, frames, height, width\)"):
        ran(*opened(wan.file), video(wan, latent=torch.zeros(1, 4, 5, 7)))
