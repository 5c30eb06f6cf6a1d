"""ControlNets without ComfyUI: the nodes, and how long the ranks keep a net."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.parity import PER_RUN
from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.headless.workflow import node_classes
from comfy_xdit.nodes.controlnet import open_controlnet
from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.messages import Forget, Keep, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks import holders as life
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.hints import scaled
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.vae import RemoteVAE
from tests import controlnets, tiny
from tests.controlnets import applied, hint_for, random
from tests.test_controlnet_ranks import plain_run
from worker.store import BUDGET

TWO = ParallelConfig(ring_degree=2)  # that of no test of life: handles of others linger


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return controlnets.write_nets(tmp_path_factory.mktemp("controlnets"))


@pytest.fixture
def remote(tiny_models) -> RemoteModel:
    remote = RemoteModel(ModelSpec.of(tiny_models["sd3"].file, "transformer"), TWO)
    worker_group(TWO).call(Forget())
    remote.load()
    return remote


def call(model):
    return (
        random(1, 16, 8, 12, seed=1),
        torch.full((1,), 700.0),
        tiny.conditions(model.family, model.config, 5),
    )


def kept(kind: str = "controlnet") -> list[str]:
    """What both ranks hold of a kind."""
    held = [worker_group(TWO).call(Status(), ranks=(rank,)).value["models"] for rank in (0, 1)]
    names = [[model["name"] for model in models if model["kind"] == kind] for models in held]
    assert names[0] == names[1]
    return names[0]


def test_loaded_once_kept_between_calls_and_gone_with_the_model(remote, tiny_models, nets):
    model = tiny_models["sd3"]
    x, timestep, given = call(model)
    one, two = (applied(nets[name], hint_for(nets[name], x)) for name in ("sd3", "sd3 again"))
    for chosen in ((one,), (), (one, two), (two,)):
        remote.denoise(x, timestep, given, nets=chosen)

    status = worker_group(TWO).call(Status(), ranks=(0,)).value
    assert status["loads"] >= 3
    before = status["loads"]
    remote.denoise(x, timestep, given, nets=(one, two))
    assert worker_group(TWO).call(Status(), ranks=(0,)).value["loads"] == before
    assert kept() == ["sd3.safetensors", "sd3 again.safetensors"]

    worker_group(TWO).call(Forget((remote.spec,)))

    assert kept() == kept("transformer") == []


def test_a_net_never_costs_its_model(tiny_models, nets, monkeypatch):
    """With room for the model alone the nets come and go, and the model stays."""
    model = tiny_models["sd3"]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    worker_group(TWO).close()
    monkeypatch.setenv(BUDGET, str(sum(p.nbytes for p in model.module.parameters()) + 1))
    x, timestep, given = call(model)
    one, two = (applied(nets[name], hint_for(nets[name], x)) for name in ("sd3", "sd3 again"))
    try:
        expected = remote.denoise(x, timestep, given, nets=(one,))
        both = remote.denoise(x, timestep, given, nets=(one, two))
        assert kept("transformer") == ["sd3.safetensors"]
        assert kept() == ["sd3 again.safetensors"]
        assert torch.equal(remote.denoise(x, timestep, given, nets=(one,)), expected)
        assert torch.equal(remote.denoise(x, timestep, given, nets=(one, two)), both)
        # The model once, the first net twice, the second one twice.
        assert worker_group(TWO).call(Status(), ranks=(0,)).value["loads"] == 5
    finally:
        worker_group(TWO).close()


def test_a_net_that_nobody_holds_is_let_go(remote, tiny_models, nets, monkeypatch):
    monkeypatch.setattr(life, "LINGER_SECONDS", 0.0)
    model = tiny_models["sd3"]
    x, timestep, given = call(model)
    handle = open_controlnet(str(nets["sd3"].file), HEADLESS)
    handle.needed_by(remote)
    net = replace(applied(nets["sd3"], hint_for(nets["sd3"], x)), net=handle.spec)
    with_net = remote.denoise(x, timestep, given, nets=(net,))
    assert kept() == ["sd3.safetensors"]

    del handle
    gc.collect()

    deadline = time.monotonic() + 10
    while kept() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept() == []
    assert kept("transformer") == [tiny_models["sd3"].file.name]
    assert torch.equal(remote.denoise(x, timestep, given, nets=(net,)), with_net)  # and is loaded again


def test_a_hint_travels_once(remote, tiny_models, nets, monkeypatch):
    model = tiny_models["sd3"]
    x, timestep, given = call(model)
    net = applied(nets["sd3"], hint_for(nets["sd3"], x))
    sent, group = [], worker_group(TWO)
    original = type(group).call

    def watched(self, message, **options):
        def made(generation):
            sent.append(message(generation))
            return sent[-1]

        return original(self, made if callable(message) else message, **options)

    monkeypatch.setattr(type(group), "call", watched)
    for _ in range(3):  # a ComfyUI node gives another tensor of the same content
        remote.denoise(x, timestep, given, nets=(replace(net, hint=net.hint.clone()),))

    assert [isinstance(message.nets[0].hint, Keep) for message in sent] == [True, False, False]


def test_a_graph_without_comfyui(tiny_models, nets):
    """Loader, apply on both sides and the sampler, against plain diffusers on the latents of the hint."""
    model, net = tiny_models["sd3"], nets["sd3"]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    vae = RemoteVAE(ModelSpec.of(HEADLESS.path("vae", "demo_vae (comfy_xdit).safetensors"), "vae"), TWO)
    picture = torch.rand(1, 48, 96, 3, generator=torch.Generator().manual_seed(1))
    classes = node_classes()
    (control_net,) = classes["XDiTControlNetLoader"]().load(str(net.file))
    sides = []
    for seed in (1, 2):
        given = tiny.conditions(model.family, model.config, 6 + seed, seed=seed)
        conditioning = [[given["context"], {"pooled_output": given["y"]}]]
        (conditioning,) = classes["XDiTControlNetApply"]().apply(
            conditioning=conditioning, control_net=control_net, image=picture, strength=0.7, start=0.1,
            end=0.6, vae=vae, control_type="none",
        )  # fmt: skip
        sides.append(conditioning)

    start = {"samples": torch.zeros(1, 16, 5, 9)}
    inputs = SamplerInputs(
        3, 4, 3.0, "euler", "simple", positive=sides[0], negative=sides[1], latent_image=start
    )
    request, finish = HEADLESS.sample_request(remote, inputs)

    hint = request.positive_nets[0].hint
    assert hint is request.negative_nets[0].hint
    assert torch.equal(hint, vae.encode(scaled(picture.movedim(-1, 1), 40, 72).movedim(1, -1)))
    # SD3's levels at 0.1 and 0.6 of a run: 3 t / (1 + 2 t) at t = 0.9 and 0.4.
    assert request.positive_nets[0].sigmas == pytest.approx((2.7 / 2.8, 1.2 / 1.8))
    acting = [float(s) for s in request.sigmas[:-1] if 2.7 / 2.8 >= float(s) >= 1.2 / 1.8]
    assert 0 < len(acting) < 4
    expected = plain_run(model, request, {control_net.spec: net})
    actual = remote.sample(request)
    assert tiny.relative_l2(actual - request.noise, expected - request.noise) <= PER_RUN
    assert finish(actual).shape == (1, 16, 5, 9)


@pytest.mark.parametrize(
    ("size", "target", "crop"),
    [
        ((4, 8), (4, 4), (0, 2)),
        ((8, 4), (4, 4), (2, 0)),
        ((6, 6), (3, 3), (0, 0)),
        ((5, 9), (10, 18), (0, 0)),
    ],
)
def test_scaled_cuts_around_the_centre(size, target, crop):
    picture = torch.arange(size[0] * size[1], dtype=torch.float32).reshape(1, 1, *size)
    down, across = crop
    part = picture[..., down : size[0] - down, across : size[1] - across]
    rows = ((torch.arange(target[0]) + 0.5) * part.shape[-2] / target[0]).floor().long()
    columns = ((torch.arange(target[1]) + 0.5) * part.shape[-1] / target[1]).floor().long()

    assert torch.equal(scaled(picture, *target), part[..., rows, :][..., columns])
