"""CONDITIONING and LATENT to the arguments of a run: repeated as ComfyUI does, or refused by name."""

import math
import re
from dataclasses import replace

import pytest
import torch

from comfy_xdit.headless import conversion
from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from tests.described import DESCRIBED

SPEC = ModelSpec("/models/some.safetensors", "transformer")
PICTURES = replace(DESCRIBED.latent, channels=16, scale=1.5305, mean=(0.0609,))
MODEL = replace(DESCRIBED, latent=PICTURES)
GUIDANCE = PromptPart("guidance", "guidance", 3.5)


def conditioning(rows: int = 1, **options):
    """One entry with a context (rows, 7, 32) and a pooled output (rows, 8)."""
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(rows, 7, 32, generator=generator)
    pooled = torch.randn(rows, 8, generator=generator)
    return [[context, {"pooled_output": pooled, **options}]]


def latent(*shape: int, **more):
    """A LATENT of random values; (2, 16, 4, 6) by default."""
    samples = torch.randn(shape or (2, 16, 4, 6), generator=torch.Generator().manual_seed(5))
    return {"samples": samples, **more}


def request(**changes):
    """The message of a short run, with some inputs changed."""
    inputs = {
        "seed": 1,
        "steps": 4,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": conditioning(),
        "negative": conditioning(),
        "latent_image": latent(),
        "denoise": 1.0,
    }
    return conversion.build_sample(SPEC, MODEL, SamplerInputs(**{**inputs, **changes}))


def test_conditioning_is_repeated_to_the_batch():
    given = conditioning()
    found = conversion.conditions_of(given, MODEL, batch=3)
    assert set(found) == {"context", "y"}
    assert found["context"].shape == (3, 7, 32)
    assert found["y"].shape == (3, 8)
    assert (found["context"] == given[0][0]).all()


def test_conditioning_longer_than_the_batch_is_cut():
    given = conditioning(rows=3)
    assert torch.equal(conversion.conditions_of(given, MODEL, batch=2)["context"], given[0][0][:2])


@pytest.mark.parametrize(("options", "expected"), [({}, 3.5), ({"guidance": 1.5}, 1.5)])
def test_a_model_that_takes_guidance_has_it_for_every_picture(options, expected):
    model = replace(MODEL, prompt=(*MODEL.prompt, GUIDANCE))
    found = conversion.conditions_of(conditioning(**options), model, batch=2)
    assert found["guidance"].tolist() == [expected, expected]


def test_options_that_say_nothing_are_taken():
    given = conditioning(start_percent=0.0, end_percent=1.0, strength=1.0, mask=None, guidance=4.0)
    assert set(conversion.conditions_of(given, MODEL, 1)) == {"context", "y"}


@pytest.mark.parametrize(
    "options",
    [
        {"area": (4, 4, 0, 0)},
        {"mask": torch.ones(1, 4, 4)},
        {"control": object()},
        {"hooks": object()},
        {"start_percent": 0.2},
        {"end_percent": 0.5},
        {"strength": 0.7},
        {"reference_latents": [torch.zeros(1)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_only_comfyui_can_honour_is_refused_by_name(options):
    with pytest.raises(InvalidInput, match=rf"carries {next(iter(options))}, .*use the stock KSampler"):
        conversion.conditions_of(conditioning(**options), MODEL, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "without an entry"),
        (None, "NoneType"),
        (conditioning() + conditioning(), "2 entries"),
        ([[torch.zeros(1, 7, 32), {}]], "no pooled_output"),
        ([[torch.zeros(7, 32), {"pooled_output": torch.zeros(1, 8)}]], "(7, 32)"),
        ([[torch.full((1, 7, 32), math.nan), {"pooled_output": torch.zeros(1, 8)}]], "not a number"),
    ],
)
def test_what_is_no_conditioning_is_refused(given, words):
    with pytest.raises(InvalidInput, match=re.escape(words)):
        conversion.conditions_of(given, MODEL, 1)


def test_a_model_may_take_no_more_than_the_context():
    given = conditioning()
    del given[0][1]["pooled_output"]
    model = replace(MODEL, prompt=(PromptPart("context"),))
    assert torch.equal(conversion.conditions_of(given, model, 1)["context"], given[0][0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (latent(1, 4, 8, 8), "latent has 4 channels, the model takes 16; use EmptySD3LatentImage"),
        (latent(1, 16, 1, 8, 8), "(1, 16, 1, 8, 8)"),
        (latent(0, 16, 8, 8), "(0, 16, 8, 8)"),
        ({"samples": torch.full((1, 16, 4, 4), math.inf)}, "infinite"),
        ({"samples": [0.0]}, "without a `samples` tensor"),
        ("latent", "is a str"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused(given, words):
    with pytest.raises(InvalidInput, match=re.escape(words)):
        conversion.samples_of(given, PICTURES)


def test_an_empty_latent_of_other_channels_becomes_one_of_the_models():
    samples = conversion.samples_of({"samples": torch.zeros(2, 4, 8, 6)}, PICTURES)
    assert samples.shape == (2, 16, 8, 6)
    assert samples.count_nonzero() == 0


def test_a_picture_for_a_model_of_videos_is_one_frame():
    space = LatentSpace(16, 3, patch=(1, 2, 2))
    picture = latent()["samples"]
    assert torch.equal(conversion.samples_of({"samples": picture}, space)[:, :, 0], picture)
    with pytest.raises(InvalidInput, match=r"takes \(batch, 16, frames, height, width\)"):
        conversion.samples_of(latent(1, 2, 16, 3, 4, 4), space)


def test_noise_is_that_of_torch_for_the_seed_and_leaves_the_global_generator_alone():
    samples = latent()["samples"]
    before = torch.get_rng_state()
    noise = conversion.noise_of(samples, seed=42)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        assert torch.equal(noise, torch.randn(samples.shape, generator=torch.manual_seed(42)))


def test_batch_index_gives_a_picture_the_noise_of_its_place():
    samples = latent()["samples"]
    first, third = conversion.noise_of(samples, 42, batch_index=[0, 2])
    again = conversion.noise_of(torch.zeros(4, *samples.shape[1:]), 42, batch_index=[0, 1, 2, 2])
    assert torch.equal(first, again[0])
    assert torch.equal(third, again[2])
    assert torch.equal(again[2], again[3])


def test_batch_index_of_another_length_is_refused():
    with pytest.raises(InvalidInput, match="batch_index"):
        conversion.noise_of(latent()["samples"], 1, batch_index=[0])


def test_the_mask_is_resized_and_repeated():
    mask = torch.zeros(1, 32, 48)
    mask[:, :, 24:] = 1
    found = conversion.mask_of({"noise_mask": mask}, latent()["samples"])
    assert found.shape == (2, 1, 4, 6)
    assert found[:, :, :, 0].max() == 0
    assert found[:, :, :, -1].min() == 1


def test_a_mask_that_is_none_is_refused():
    with pytest.raises(InvalidInput, match="Set Latent Noise Mask"):
        conversion.mask_of({"noise_mask": "all"}, latent()["samples"])


def test_the_answer_is_scaled_back():
    given = latent()
    message, finish = request(latent_image=given)
    expected = (given["samples"] - 0.0609) * 1.5305
    assert torch.allclose(message.latent, expected)
    assert torch.allclose(finish(message.latent), given["samples"], atol=1e-6)


def test_an_empty_latent_is_not_shifted():
    message, _ = request(latent_image={"samples": torch.zeros(1, 16, 4, 4)})
    assert message.latent.count_nonzero() == 0


def test_the_message_of_a_run():
    message, _ = request(latent_image=latent(noise_mask=torch.ones(1, 8, 8)))
    assert (message.sampler, message.cfg, message.prediction) == ("euler", 3.0, "flow")
    assert message.sigmas.shape == (5,)
    assert torch.equal(message.timesteps, message.sigmas * 1000)
    assert message.positive["context"].shape[0] == message.negative["y"].shape[0] == 2
    assert message.mask.shape == (2, 1, 4, 6)


def test_at_cfg_1_there_is_no_negative_prompt():
    assert request(cfg=1.0)[0].negative is None


def test_a_sampler_that_does_not_run_in_the_ranks_is_refused():
    with pytest.raises(InvalidInput, match=r"'uni_pc' does not run in the ranks .euler, heun, dpmpp_2m do"):
        request(sampler_name="uni_pc")
