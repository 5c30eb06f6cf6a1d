"""Strategy auto on real ranks: the layout fits the model, times are remembered, the report says why."""

from dataclasses import replace

import pytest
import torch

import nodes
from comfy_xdit.nodes.report import report
from comfy_xdit.planning import auto, measured
from comfy_xdit.planning.auto import layout_of, machine
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.prediction import predict
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.deadlines import Deadlines
from comfy_xdit.ranks.registry import running_groups
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.models.flux.family import Flux

TWO = Automatic(("cpu", "cpu"))
NOISE, TOKENS = (1, 16, 16, 16), 64
THREE_HEADS = {**tiny.FLUX_CONFIG, "num_attention_heads": 3}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No choice and no time of another test counts."""
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    auto._chosen.clear()


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory):
    """A tiny Flux with three heads, which Ulysses 2 does not divide: module, file."""
    module = tiny.build(Flux(), THREE_HEADS)
    file = tmp_path_factory.mktemp("auto") / "three.safetensors"
    return module, tiny.write_native(Flux(), module, THREE_HEADS, file)


def test_heads_that_do_not_divide_are_known_before_the_ranks_start(three_heads):
    module, file = three_heads
    loader = nodes.NODE_CLASS_MAPPINGS["XDiTLoadDiffusionModel"]()
    (remote,) = loader.load(str(file), "default", TWO)
    assert remote.info["heads"] == 3
    assert remote.parallel == ParallelConfig(ring_degree=2, devices=("cpu", "cpu"))

    x = torch.randn(NOISE, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(Flux(), THREE_HEADS, 7)
    timestep = torch.tensor([0.7])
    expected = tiny.reference(Flux(), module, x, timestep, given)
    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) < 1e-5


def test_guidance_gets_its_own_ranks(tiny_models):
    spec = ModelSpec.of(tiny_models["sd3"].file, "transformer")
    assert layout_of(TWO, spec) == ParallelConfig(cfg_parallel_degree=2, devices=("cpu", "cpu"))
    assert layout_of(Automatic(("cpu",)), spec) == ParallelConfig(devices=("cpu",))
    manual = ParallelConfig(ulysses_degree=2)
    assert layout_of(manual, spec) is manual


def test_weights_are_shared_when_asked_for(tiny_models, monkeypatch):
    spec = ModelSpec.of(tiny_models["sd3"].file, "transformer")
    layout = layout_of(replace(TWO, shard_weights=True), spec)
    assert layout.shard_weights and layout.world_size == 2
    with pytest.raises(InvalidInput, match=r"shard_weights spreads weights over ranks.*one rank no two have"):
        layout_of(Automatic(("cpu",), shard_weights=True), spec)


def test_what_is_no_model_is_an_error_and_starts_no_group_of_its_own(tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a model")
    with pytest.raises(InvalidInput, match=r"bad\.safetensors"):
        layout_of(TWO, ModelSpec.of(bad, "transformer"))
    assert all(group.parallel.world_size <= 2 for group in running_groups())


def test_one_device_is_no_choice_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "available_devices", lambda: ("cuda:0",))
    missing = ModelSpec(str(tmp_path / "nothing.safetensors"), "transformer")
    assert layout_of(Automatic(), missing) == ParallelConfig(devices=("cuda:0",))


def test_a_description_is_asked_for_once_per_file(tiny_models, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(tiny_models["sd3"].file.read_bytes())
    told = auto.description(ModelSpec.of(file, "transformer"))

    def nobody(*_):
        raise AssertionError("a rank was asked")

    with monkeypatch.context() as patch:
        patch.setattr(auto, "running_groups", list)
        patch.setattr(auto, "worker_group", nobody)
        assert auto.description(ModelSpec.of(file, "transformer")) == told
        file.write_bytes(tiny_models["flux"].file.read_bytes())
        with pytest.raises(AssertionError, match="a rank was asked"):
            auto.description(ModelSpec.of(file, "transformer"))
    assert auto.description(ModelSpec.of(file, "transformer")).family == "flux"


def test_the_description_says_what_a_plan_needs(tiny_models):
    for name, dual in (("sd3", 0), ("sd3.5-medium", 2), ("flux", 0)):
        model = tiny_models[name]
        told = auto.description(ModelSpec.of(model.folder, "transformer"))
        config = model.config
        layers = config["num_layers"] + config.get("num_single_layers", 0)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        assert (told.width, told.blocks, told.dual) == (width, layers, dual)
        assert told.guided is (name != "flux") and told.stored == "float32"
        assert told.streams == ("image", "text") and told.latent.patch == (2, 2)
        assert [part.name for part in told.prompt][2:] == (["guidance"] if name == "flux" else [])
        assert told.parameters == sum(p.numel() for p in model.module.parameters())


def test_a_run_is_remembered_and_the_next_plan_and_its_deadline_know_it(tiny_models, monkeypatch):
    model = tiny_models["sd3"]
    spec = ModelSpec.of(model.file, "transformer")
    layout = layout_of(TWO, spec)
    remote = RemoteModel(spec, layout)
    shape = ModelShape.of(remote.described())
    request = Request(shape, TOKENS, 0, cfg=True, dtype_bytes=4)

    x, given = torch.zeros(NOISE), tiny.conditions(model.family, model.config, 7)
    sigmas = torch.linspace(1.0, 0.0, 5)
    loop = Sample(spec, "euler", sigmas, x, torch.randn(NOISE), 2.0, given, given, sigmas * 1000)
    guesses: list[float | None] = []
    limits = Deadlines.limits

    def seen(self, kind, guess=None):
        guesses.append(guess)
        return limits(self, kind, guess)

    monkeypatch.setattr(Deadlines, "limits", seen)
    remote.sample(loop)  # the first of a kind is slow, and does not count
    predicted = predict(
        layout, replace(request, text_tokens=shape.text_tokens, steps=4), machine(TWO.devices)
    )
    assert guesses == [pytest.approx(predicted.seconds)]
    assert Measured.load().seconds(layout, request, machine(TWO.devices)) is None
    remote.sample(loop)
    assert 0 < Measured.load().seconds(layout, request, machine(TWO.devices)) < 10

    measured_once = Measured.load().seconds(layout, request, machine(TWO.devices))
    remote.calls._guess = (None, 0.0)  # as of the handle of another run
    remote.sample(loop)
    assert guesses[-1] == measured_once, "what is remembered is better than what is predicted"

    for _ in range(2):
        remote.denoise(x, torch.tensor([500.0]), given)
    assert guesses[-1] == guesses[-2] > 0
    single = Request(shape, TOKENS, 0, dtype_bytes=4)
    assert 0 < Measured.load().seconds(layout, single, machine(TWO.devices)) < 10


def test_times_choose_the_layout_of_the_next_process_and_not_of_this_one(tiny_models):
    spec = ModelSpec.of(tiny_models["sd3"].file, "transformer")
    first = layout_of(TWO, spec)
    shape = ModelShape.of(auto.description(spec))
    request = Request.picture(shape, dtype_bytes=4)
    for layout, seconds in ((ParallelConfig(), 1.0), (first, 2.0)):
        measured.remember(layout, request, machine(TWO.devices), seconds)
    assert layout_of(TWO, spec) == first
    auto._chosen.clear()  # as in a new process
    assert layout_of(TWO, spec) == ParallelConfig(devices=("cpu",))


def test_an_equal_model_joins_the_ranks_of_the_first(tiny_models):
    """The pipeline whose text encoders a graph uses and the file it takes the MODEL from, or a fine-tune."""
    first, second = (
        ModelSpec.of(path, "transformer") for path in (tiny_models["sd3"].folder, tiny_models["sd3"].file)
    )
    layout = layout_of(TWO, first)
    request = Request.picture(ModelShape.of(auto.description(first)), dtype_bytes=4)
    for other, seconds in ((ParallelConfig(), 1.0), (layout, 2.0)):
        measured.remember(other, request, machine(TWO.devices), seconds)
    assert layout_of(TWO, second) == layout
    assert [path for path, _ in auto.chosen_for(layout)] == [first.path, second.path]
    assert layout_of(replace(TWO, shard_weights=True), second).shard_weights


def test_the_report_says_what_was_chosen_and_why_and_what_was_measured(tiny_models):
    spec = ModelSpec.of(tiny_models["sd3"].file, "transformer")
    layout = layout_of(TWO, spec)
    remote = RemoteModel(spec, layout)
    request = Request.picture(ModelShape.of(remote.described()), dtype_bytes=4)
    text = report(())
    assert "plan for sd3.safetensors at 1024 x 1024 (auto): predicted" in text
    assert "predicted per step: cfg 2 " in text and "measured" not in text

    measured.remember(layout, request, machine(TWO.devices), 2.0)
    measured.remember(ParallelConfig(), request, machine(TWO.devices), 1.0)
    text = report(())
    assert "(measured 2000)" in text and "after the next start: one rank" in text


def test_a_vae_takes_the_ranks_that_run_or_all_devices(monkeypatch):
    class Group:
        def __init__(self, layout: ParallelConfig, pids: list[int]):
            self.parallel, self.pids = layout, pids

    given = ParallelConfig(ring_degree=2, devices=("cpu", "cpu"))
    monkeypatch.setattr(auto, "available_devices", lambda: tuple(f"cuda:{i}" for i in range(4)))
    pair = ParallelConfig(cfg_parallel_degree=2, devices=("cuda:2", "cuda:3"))
    monkeypatch.setattr(auto, "running_groups", lambda: [Group(pair, [1, 2]), Group(given, [])])

    assert auto.layout_beside(given) == given
    assert auto.layout_beside(Automatic()) == pair
    elsewhere = ("cuda:0", "cuda:1", "cuda:2")
    assert auto.layout_beside(Automatic(elsewhere)) == ParallelConfig(ulysses_degree=3, devices=elsewhere)
