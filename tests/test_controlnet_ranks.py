"""ControlNets in the ranks against plain diffusers: its ControlNet and its transformer on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.parity import LAYOUTS, PER_CALL, PER_RUN, SHARDED, multiplier
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import controlnets, tiny
from tests.controlnets import applied, hint_for, random, reference

CHOSEN = ("1 rank", "Ulysses 2", "Ring 2", "CFG 2", "data 2", "Ulysses 2 x Ring 2", "CFG 2 x Ulysses 2")
ALL = {name: LAYOUTS[name] for name in CHOSEN} | {"Ulysses 2, sharded": SHARDED["Ulysses 2, sharded"]}
SIZES = {"even": (8, 12), "odd": (5, 21)}  # in latent pixels: 24 tokens, and 3 x 11
MODES = {"flux union": 2}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return controlnets.write_nets(tmp_path_factory.mktemp("controlnets"))


@pytest.fixture(scope="module", params=ALL)
def layout(request) -> ParallelConfig:
    """Grouped by pytest, so that each layout's ranks start once."""
    return ALL[request.param]


def handle(model, layout=LAYOUTS["1 rank"]) -> RemoteModel:
    return RemoteModel(ModelSpec.of(model.file, "transformer"), layout)


def inputs(model, size=(8, 12), batch=2, text=9):
    x = random(batch, 16, *size, seed=1)
    timestep = torch.full((batch,), 0.7 * multiplier(model))
    return x, timestep, tiny.conditions(model.family, model.config, text, batch)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", controlnets.NETS)
def test_one_call(tiny_models, nets, layout, name, size):
    net = nets[name]
    model, mode = tiny_models[net.model], MODES.get(name)
    x, timestep, given = inputs(model, SIZES[size])
    hint, remote = hint_for(net, x), handle(model, layout)
    expected = reference(model, x, timestep, given, (net, hint, 0.8, mode))

    actual = remote.denoise(x, timestep, given, nets=(applied(net, hint, 0.8, mode=mode),))

    assert tiny.relative_l2(actual, expected) <= PER_CALL
    without = reference(model, x, timestep, given)
    assert tiny.relative_l2(expected, without) > 0.01  # the net says something
    assert tiny.relative_l2(remote.denoise(x, timestep, given), without) <= PER_CALL


@pytest.mark.parametrize(
    ("first", "second"), [("sd3", "sd3"), ("flux", "flux"), ("flux union", "flux union")]
)
def test_two_stacked(tiny_models, nets, layout, first, second):
    """diffusers adds up what several nets of one depth say."""
    one, two = nets[first], nets[second]
    model = tiny_models[one.model]
    x, timestep, given = inputs(model, SIZES["odd"])
    hints = hint_for(one, x, seed=3), hint_for(two, x, batch=2, seed=4)
    modes = (0, 1) if first == "flux union" else (None, None)
    called = [(one, hints[0], 0.8, modes[0]), (two, hints[1], -0.4, modes[1])]
    expected = reference(model, x, timestep, given, *called)

    actual = handle(model, layout).denoise(
        x, timestep, given, nets=tuple(applied(n, h, s, mode=m) for n, h, s, m in called)
    )

    assert tiny.relative_l2(actual, expected) <= PER_CALL


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_prompts_of_two_lengths_in_one_call(tiny_models, nets, layout, name):
    net = nets[name]
    model = tiny_models[net.model]
    x, timestep, _ = inputs(model, SIZES["odd"])
    hint = hint_for(net, x, batch=2)
    single = [tiny.conditions(model.family, model.config, n, seed=n) for n in (5, 12)]
    expected = torch.cat(
        [
            reference(model, x[i : i + 1], timestep[:1], given, (net, hint[i : i + 1], 0.8, None))
            for i, given in enumerate(single)
        ]
    )
    given = {key: torch.cat([one[key] for one in single]) for key in single[0] if key != "context"}
    given["context"] = torch.cat(
        [torch.nn.functional.pad(single[0]["context"], (0, 0, 0, 7)), single[1]["context"]]
    )
    given["context_lengths"] = torch.tensor((5, 12))

    actual = handle(model, layout).denoise(x, timestep, given, nets=(applied(net, hint),))

    assert tiny.relative_l2(actual, expected) <= PER_CALL


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("sides", ["both", "positive", "negative", "different"])
def test_a_run_in_the_ranks(tiny_models, nets, layout, name, sides):
    """Four steps, of which the net acts in some; on both sides of guidance, on one, or two nets."""
    net = nets[name]
    model = tiny_models[net.model]
    asked, hint = run_of(model), hint_for(net, random(1, 16, 5, 21, seed=0))
    acting = applied(net, hint, 0.8, sigmas=(0.9, 0.4))
    other = replace(acting, strength=0.5)
    chosen = {
        "both": ((acting,), (acting,)), "positive": ((acting,), ()), "negative": ((), (acting,)),
        "different": ((acting,), (other,)),
    }[sides]  # fmt: skip
    request = replace(asked, positive_nets=chosen[0], negative_nets=chosen[1])
    expected = plain_run(model, request, {net.spec: net})

    actual = handle(model, layout).sample(request)

    noise = request.noise
    assert tiny.relative_l2(actual - noise, expected - noise) <= PER_RUN
    assert tiny.relative_l2(expected - noise, plain_run(model, asked, {}) - noise) > 0.003


def run_of(model, batch: int = 1) -> Sample:
    noise = random(batch, 16, 5, 21, seed=5)
    sides = [tiny.conditions(model.family, model.config, n, batch, seed=n) for n in (7, 12)]
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0])
    return Sample(
        ModelSpec.of(model.file, "transformer"), "euler", sigmas, torch.zeros_like(noise), noise, 3.0, *sides,
        sigmas * multiplier(model),
    )  # fmt: skip


def plain_run(model, asked: Sample, known) -> torch.Tensor:
    """Euler with guidance on plain diffusers."""
    x = asked.noise * asked.sigmas[0]
    for i in range(len(asked.sigmas) - 1):
        sigma, t = asked.sigmas[i], asked.timesteps[i].expand(len(x))
        outputs = []
        for given, side in ((asked.positive, asked.positive_nets), (asked.negative, asked.negative_nets)):
            called = [
                (known[n.net], n.hint, n.strength, n.mode)
                for n in side
                if n.sigmas[0] >= float(sigma) >= n.sigmas[1]
            ]
            outputs.append(reference(model, x, t, given, *called))
        x = x + (asked.sigmas[i + 1] - sigma) * (outputs[1] + asked.cfg * (outputs[0] - outputs[1]))
    return x


def test_without_the_net_it_is_the_base_model_to_the_bit(tiny_models, nets, layout):
    model, net = tiny_models["flux"], nets["flux"]
    x, timestep, given = inputs(model)
    remote = handle(model, layout)
    before = remote.denoise(x, timestep, given)

    with_net = remote.denoise(x, timestep, given, nets=(applied(net, hint_for(net, x)),))

    assert tiny.relative_l2(with_net, before) > 0.01
    assert torch.equal(remote.denoise(x, timestep, given), before)


def test_reference_latents_behind_the_picture(tiny_models, nets, layout):
    """FLUX.1 Kontext: the net knows the picture only, whose tokens are then cut in other places."""
    model, net = tiny_models["flux"], nets["flux"]
    x, timestep, given = inputs(model, SIZES["odd"])
    hint = hint_for(net, x)
    with_reference = given | {"ref_latents": [random(2, 16, 4, 6, seed=8)], "ref_latents_method": "offset"}
    call = model.family.call(model.config, controlnets.to_whole_patches(x, (2, 2)), timestep, given)
    with torch.no_grad():
        residuals = controlnets._net_outputs(
            net, call.kwargs, hint, 0.8, None, controlnets.to_whole_patches(x, (2, 2))
        )
    control = {"input": residuals[0] * 2, "output": [r for r in residuals[1] for _ in range(2)][:3]}
    remote = handle(model, layout)
    expected = remote.denoise(x, timestep, with_reference, control=control)  # test_control.py holds this way

    actual = remote.denoise(x, timestep, with_reference, nets=(applied(net, hint),))

    assert tiny.relative_l2(actual, expected) <= PER_CALL
    assert tiny.relative_l2(actual, remote.denoise(x, timestep, with_reference)) > 0.01


def test_stock_residuals_and_nets_in_the_ranks_add_up(tiny_models, nets, layout):
    model, net = tiny_models["sd3"], nets["sd3"]
    x, timestep, given = inputs(model, SIZES["odd"])
    hint, residual = hint_for(net, x), random(2, 33, 256, seed=6)
    remote = handle(model, layout)
    with torch.no_grad():
        padded = controlnets.to_whole_patches(x, (2, 2))
        call = model.family.call(model.config, padded, timestep, given)
        (samples,) = controlnets._net_outputs(net, call.kwargs, hint, 0.8, None, padded)
        sums = [samples[0] + residual, samples[0] + residual, samples[1] + residual]
        theirs = {"block_controlnet_hidden_states": sums}
        (sample,) = model.module(**call.kwargs, **theirs, return_dict=False)

    actual = remote.denoise(
        x, timestep, given, control={"output": [residual, residual]}, nets=(applied(net, hint),)
    )

    assert tiny.relative_l2(actual, sample[..., :5, :21]) <= PER_CALL


@pytest.mark.parametrize("naming", ["folder", "xlabs", "file beside its config"])
def test_other_forms_on_disk(tiny_models, nets, tmp_path, naming):
    net = nets["flux pixels" if naming == "xlabs" else "flux"]
    path = net.folder
    if naming == "xlabs":
        path = tmp_path / "xlabs.safetensors"
        save_file(controlnets.xlabs(net.module), path)
    elif naming == "file beside its config":
        path = net.folder / "diffusion_pytorch_model.safetensors"
    model = tiny_models["flux"]
    x, timestep, given = inputs(model, SIZES["odd"])
    hint = hint_for(net, x)

    actual = handle(model).denoise(
        x, timestep, given, nets=(replace(applied(net, hint), net=ControlNet.of(path)),)
    )

    assert tiny.relative_l2(actual, reference(model, x, timestep, given, (net, hint, 0.8, None))) <= PER_CALL
