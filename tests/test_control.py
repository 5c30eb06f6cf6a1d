"""ControlNet residuals and prompts of several lengths in one call, against plain diffusers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layouts import LAYOUTS
from benchmarks.parity import PER_CALL, multiplier
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.plain import flatten, rebuild
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny

# 33 tokens: two ranks have 17 and 16; four have 9, 8, 8 and 8, which do not lie at multiples of 9.
HEIGHT, WIDTH = 6, 22
TOKENS = HEIGHT * WIDTH // 4


@pytest.fixture(scope="module", params=("1 rank", "Ulysses 2", "CFG 2", "Ulysses 2 x Ring 2"))
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expected(model, x, timestep, given, **residuals) -> torch.Tensor:
    call = model.family.call(dict(model.module.config), x, timestep, given)
    with torch.no_grad():
        (sample,) = model.module(**call.kwargs, **residuals, return_dict=False)
    return model.family.output(dict(model.module.config), sample, x)


def _width(model) -> int:
    return model.config["num_attention_heads"] * model.config["attention_head_dim"]


@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium", "flux"])
@pytest.mark.parametrize("batch", [1, 2])
def test_residuals_reach_their_blocks(tiny_models, layout, name, batch):
    """diffusers' own ControlNet arguments are the reference: one residual per block."""
    model = tiny_models[name]
    x, timestep = _random(batch, 16, HEIGHT, WIDTH, seed=1), torch.full((batch,), 0.7 * multiplier(model))
    given = tiny.conditions(model.family, model.config, 9, batch)
    many = [_random(batch, TOKENS, _width(model), seed=i) for i in range(5)]
    if name == "flux":
        control = {"input": [many[0], many[1], many[4]], "output": [many[2], many[3], many[2]]}
        theirs = {
            "controlnet_block_samples": many[:2],
            "controlnet_single_block_samples": control["output"],
        }
    else:  # diffusers never adds one after the last block
        control = {"output": [many[0], many[1], None], "input": [many[3]]}
        theirs = {"block_controlnet_hidden_states": [many[0], many[1], many[1]]}
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), layout)
    expected = _expected(model, x, timestep, given, **theirs)

    actual = remote.denoise(x, timestep, given, control=control)

    assert tiny.relative_l2(actual, expected) <= PER_CALL
    without = remote.denoise(x, timestep, given)  # and it was for that call only
    assert tiny.relative_l2(without, _expected(model, x, timestep, given)) <= PER_CALL
    assert tiny.relative_l2(without, expected) > 0.01


def test_a_residual_may_cover_the_first_tokens_only(tiny_models, layout):
    model = tiny_models["flux"]
    x, timestep = _random(2, 16, HEIGHT, WIDTH, seed=1), torch.full((2,), 0.7)
    given = tiny.conditions(model.family, model.config, 9, 2)
    short = _random(1, 7, _width(model), seed=3)  # one for both pictures
    whole = torch.nn.functional.pad(short, (0, 0, 0, TOKENS - 7))
    expected = _expected(model, x, timestep, given, controlnet_block_samples=[whole, torch.zeros_like(whole)])
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), layout)

    actual = remote.denoise(x, timestep, given, control={"input": [short, None]})

    assert tiny.relative_l2(actual, expected) <= PER_CALL


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("lengths", [(5, 12), (12, 5, 5), (7, 9, 7, 12)], ids=str)
def test_prompts_of_several_lengths_are_one_call(tiny_models, layout, name, lengths):
    model, batch = tiny_models[name], len(lengths)
    x, timestep = _random(batch, 16, HEIGHT, WIDTH, seed=1), torch.full((batch,), 0.7 * multiplier(model))
    single = [tiny.conditions(model.family, model.config, n, seed=i) for i, n in enumerate(lengths)]
    expected = torch.cat(
        [_expected(model, x[i : i + 1], timestep[i : i + 1], given) for i, given in enumerate(single)]
    )
    given = {name: torch.cat([one[name] for one in single]) for name in single[0] if name != "context"}
    padded = [torch.nn.functional.pad(c["context"], (0, 0, 0, 12 - c["context"].shape[1])) for c in single]
    given |= {"context": torch.cat(padded), "context_lengths": torch.tensor(lengths)}
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), layout)

    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) <= PER_CALL


@pytest.fixture
def flux(tiny_models) -> RemoteModel:
    return RemoteModel(ModelSpec.of(tiny_models["flux"].file, "transformer"), LAYOUTS["1 rank"])


@pytest.mark.parametrize(
    "shape", [(1, TOKENS + 1, 128), (3, TOKENS, 128), (2, TOKENS, 64), (2, TOKENS)], ids=str
)
def test_residuals_that_do_not_fit_are_refused(tiny_models, flux, shape):
    model = tiny_models["flux"]
    given = tiny.conditions(model.family, model.config, 9, 2)

    with pytest.raises(InvalidInput, match=r"residual has shape .*takes \(2, at most 33, 128\)"):
        flux.denoise(
            _random(2, 16, HEIGHT, WIDTH, seed=1),
            torch.ones(2),
            given,
            control={"output": [torch.ones(shape)]},
        )


@pytest.mark.parametrize("lengths", [(5, 8), (5,), (0, 9)], ids=str)
def test_lengths_that_do_not_fit_are_refused(tiny_models, flux, lengths):
    model = tiny_models["flux"]
    given = tiny.conditions(model.family, model.config, 9, 2) | {"context_lengths": torch.tensor(lengths)}

    with pytest.raises(InvalidInput, match=r"lengths \[.*do not fit a context of shape \(2, 9, 64\)"):
        flux.denoise(_random(2, 16, HEIGHT, WIDTH, seed=1), torch.ones(2), given)


def test_a_tensor_travels_once_however_often_it_is_named():
    one, other = torch.ones(3), torch.ones(3)

    flat = flatten({"input": [one, other, one], "output": (one, None)})
    again = rebuild(flat.head, flat.tensors)

    assert len(flat.tensors) == 2
    assert again["input"][0] is again["input"][2] is again["output"][0] is one
    assert again["input"][1] is other
