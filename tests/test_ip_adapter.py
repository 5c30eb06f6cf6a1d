"""IP-Adapters in the ranks against plain diffusers, which loads the same files by its own loader."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.parity import LAYOUTS, PER_CALL, PER_RUN, multiplier
from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.ip_adapter import apply_ip_adapter, load_ip_adapter
from comfy_xdit.nodes.lora import add_lora
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Forget, ImagePrompt, Keep, Known, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import IPAdapterFile, ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.ip_adapter import at_sigmas, negative_rows
from comfy_xdit.remote.model import RemoteModel
from tests import ip_adapter_files, lora_files, tiny
from tests.ip_adapter_files import call, embeds_of, encoded, reference, write
from tests.pipefusion_runs import request as run_request
from worker.models.flux.family import Flux
from worker.store import BUDGET

# 33 tokens: two ranks have 17 and 16; four have 9, 8, 8 and 8.
HEIGHT, WIDTH = 6, 22
ONE = LAYOUTS["1 rank"]
ON = ("1 rank", "Ulysses 2", "Ring 2", "CFG 2", "data 2", "CFG 2 x Ulysses 2", "Ulysses 2 x Ring 2")
ALWAYS = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module", params=ON)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


@pytest.fixture(params=["sd3", "flux"])
def model(request, tiny_models):
    return tiny_models[request.param]


def handle(model, layout=ONE) -> RemoteModel:
    return RemoteModel(ModelSpec.of(model.file, "transformer"), layout)


def inputs(model, batch: int = 2):
    x = torch.randn(batch, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(model.family, model.config, 9, batch)
    return x, torch.full((batch,), 0.7 * multiplier(model)), given


def applied(remote, file, output, weight=1.0, **percents) -> RemoteModel:
    """The MODEL that the node gives, without ComfyUI."""
    adapter = load_ip_adapter(str(file), HEADLESS)
    return apply_ip_adapter(remote, adapter, output, weight, **(ALWAYS | percents), here=HEADLESS)


def prompts(remote: RemoteModel) -> tuple[ImagePrompt, ...]:
    return at_sigmas(remote.pictures, lambda percent: 1.0 - percent)


def denoised(remote: RemoteModel, asked, negative=()) -> torch.Tensor:
    return remote.denoise(*asked, image_prompts=prompts(remote), negative=negative)


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("negative", [(), (True, False)], ids=["positive", "both sides"])
def test_equals_diffusers_and_leaves_nothing_behind(model, layout, tmp_path, negative):
    base, asked, output = handle(model, layout), inputs(model), encoded(model)
    plain = base.denoise(*asked)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    for weight in (1.0, 0.4, -0.7):
        expected = call(
            model, reference(model, [file], [weight]), *asked, [embeds_of(model, output)], negative
        )
        actual = denoised(applied(base, file, output, weight), asked, negative)
        assert tiny.relative_l2(actual, expected) <= PER_CALL
        assert tiny.relative_l2(plain, expected) > 100 * PER_CALL, "it would be missed"
    assert torch.equal(base.denoise(*asked), plain), "without it: the same bits as before"
    assert applied(base, file, output, 0.0) is base


def test_a_stack(model, layout, tmp_path):
    base, asked = handle(model, layout), inputs(model)
    if model.family.name == "flux":
        files = [write(model, seed, tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
        outputs = [encoded(model, 5, pictures=3), encoded(model, 6)]  # three pictures at once
        module = reference(model, files, [0.8, -0.5])
    else:  # diffusers has one: the same twice is once with the sum of the weights
        files, outputs = [write(model, 1, tmp_path / "1.safetensors")] * 2, [encoded(model)] * 2
        module = reference(model, files[:1], [0.3])
    remote = applied(applied(base, files[0], outputs[0], 0.8), files[1], outputs[1], -0.5)
    seen = [embeds_of(model, output) for output in outputs]
    assert tiny.relative_l2(denoised(remote, asked), call(model, module, *asked, seen)) <= PER_CALL


def test_attentions_of_image_tokens_alone_are_numbered_too(tiny_models, layout, tmp_path):
    """SD3.5 medium, some of whose blocks have two attentions."""
    model = tiny_models["sd3.5-medium"]
    base, asked, output = handle(model, layout), inputs(model), encoded(model)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    expected = call(model, reference(model, [file], [0.9]), *asked, [embeds_of(model, output)])
    assert tiny.relative_l2(denoised(applied(base, file, output, 0.9), asked), expected) <= PER_CALL


def test_prompts_of_several_lengths_in_one_call(model, layout, tmp_path):
    asked, output = inputs(model), encoded(model)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    module, seen = reference(model, [file], [1.0]), [embeds_of(model, output)]
    x, timestep, given = asked
    rows = []
    for row, length, negative in ((0, 5, True), (1, 9, False)):
        own = {name: value[row : row + 1] for name, value in given.items()}
        own["context"] = own["context"][:, :length]
        rows.append(call(model, module, x[row : row + 1], timestep[:1], own, seen, [negative]))
    given = given | {"context_lengths": torch.tensor([5, 9])}
    actual = denoised(applied(handle(model, layout), file, output), (x, timestep, given), (True, False))
    assert tiny.relative_l2(actual, torch.cat(rows)) <= PER_CALL


def test_with_a_lora_and_controlnet_residuals(model, layout, tmp_path):
    asked, output = inputs(model), encoded(model)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    tensors, change = lora_files.write(model, lora_files.NAMINGS["kohya"], 1)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    module = reference(model, [file], [0.8], lora_files.merged(model, (change, 0.7)))
    seen = [embeds_of(model, output)]
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    residual = torch.randn(2, HEIGHT * WIDTH // 4, width, generator=torch.Generator().manual_seed(4))
    flux = model.family.name == "flux"
    theirs = {"controlnet_block_samples" if flux else "block_controlnet_hidden_states": [residual]}
    many = {"input" if flux else "output": [residual] * (model.config["num_layers"] - (not flux))}
    expected = call(model, module, *asked, seen, (True, False), **theirs)

    remote, _ = add_lora(handle(model, layout), str(tmp_path / "lora.safetensors"), 0.7, HEADLESS)
    remote = applied(remote, file, output, 0.8)
    actual = remote.denoise(*asked, control=many, image_prompts=prompts(remote), negative=(True, False))

    assert tiny.relative_l2(actual, expected) <= PER_CALL


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_whole_run_with_a_range_of_steps(model, layout, tmp_path, cfg):
    """Euler by hand on plain diffusers; the picture counts at some noise levels only."""
    output, file = encoded(model), write(model, 1, tmp_path / "adapter.safetensors")
    asked = run_request(model, (HEIGHT, WIDTH), batch=1, steps=5, cfg=cfg)  # sigma 1, .8, .6, .4, .2, 0
    remote = applied(handle(model, layout), file, output, 0.8, start_percent=0.3, end_percent=0.65)
    pictures = prompts(remote)  # from sigma 0.7 down to 0.35: the third and the fourth step
    with_picture, base = reference(model, [file], [0.8]), handle(model, layout)
    sides = [(asked.positive, False)] + ([(asked.negative, True)] if asked.negative else [])
    x, whole = asked.noise, base.sample(asked)
    for step, sigma in enumerate(asked.sigmas[:-1]):
        t, outputs = asked.timesteps[step].expand(1), []
        for given, negative in sides:
            if step in (2, 3):
                out = call(model, with_picture, x, t, given, [embeds_of(model, output)], [negative])
            else:
                out = tiny.reference(model.family, model.module, x, t, given)
            outputs.append(out)
        slope = outputs[0] if cfg == 1 else outputs[1] + cfg * (outputs[0] - outputs[1])
        x = x + slope * (asked.sigmas[step + 1] - sigma)

    actual = remote.sample(replace(asked, image_prompts=pictures))

    assert tiny.relative_l2(actual, x) <= PER_RUN
    assert tiny.relative_l2(whole, x) > 10 * PER_RUN
    assert torch.equal(base.sample(asked), whole)


# ---------------------------------------------------------------------- what it costs


def test_it_is_read_once_and_goes_with_the_model(model, tmp_path):
    base, asked, output = handle(model), inputs(model), encoded(model)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    base.denoise(*asked)
    before = worker_group(ONE).call(Status()).value
    denoised(applied(base, file, output), asked)
    size = sum(tensor.nbytes for tensor in ip_adapter_files.tensors_for(model, 1).values())
    after = worker_group(ONE).call(Status()).value
    assert after["bytes"] - before["bytes"] == size
    base.denoise(*asked)
    denoised(applied(base, file, output, 0.3), asked)
    assert worker_group(ONE).call(Status()).value["bytes"] == after["bytes"]
    assert after["loads"] == before["loads"]
    worker_group(ONE).call(Forget((base.spec,)))
    gone = worker_group(ONE).call(Status()).value["bytes"]
    assert gone <= after["bytes"] - size, "the adapter's bytes are the model's"


def test_an_encoded_picture_travels_once(model, tmp_path, monkeypatch):
    file = write(model, 1, tmp_path / "adapter.safetensors")
    output = encoded(model, pictures=1)
    if model.family.name == "flux":  # large enough to be remembered
        output = encoded(model, pictures=64)
    remote, asked, sent = applied(handle(model), file, output), inputs(model), []
    group_call = RemoteModel._call

    def watched(self, message, **options):
        def make(generation):
            made = message(generation)
            sent.append(type(made.image_prompts[0].embeds))
            return made

        return group_call(self, make, **options)

    monkeypatch.setattr(RemoteModel, "_call", watched)
    monkeypatch.setattr("comfy_xdit.remote.sent.REMEMBERED_BYTES", 1)
    first, second = denoised(remote, asked), denoised(remote, asked)
    assert sent == [Keep, Known]
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["Ulysses 2, sharded", "CFG 2, sharded"])
def test_with_sharded_weights(model, tmp_path, name):
    from benchmarks.parity import SHARDED

    asked, output = inputs(model), encoded(model)
    file = write(model, 1, tmp_path / "adapter.safetensors")
    expected = call(model, reference(model, [file], [1.0]), *asked, [embeds_of(model, output)], (True, False))
    remote = applied(handle(model, SHARDED[name]), file, output)
    assert tiny.relative_l2(denoised(remote, asked, (True, False)), expected) <= PER_CALL


def test_where_there_is_no_room_the_adapter_of_another_run_goes(model, tmp_path, monkeypatch):
    files = [write(model, seed, tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    asked, output = inputs(model), encoded(model)
    size = sum(tensor.nbytes for tensor in ip_adapter_files.tensors_for(model, 1).values())
    own = sum(tensor.nbytes for tensor in model.module.state_dict().values())
    worker_group(ONE).close()
    monkeypatch.setenv(BUDGET, str(own + int(1.5 * size)))  # the model and one adapter
    try:
        for file in (*files, files[0]):
            expected = call(model, reference(model, [file], [1.0]), *asked, [embeds_of(model, output)])
            actual = denoised(applied(handle(model), file, output), asked)
            assert tiny.relative_l2(actual, expected) <= PER_CALL
            after = worker_group(ONE).call(Status()).value
            assert len(after["models"]) == 1
            assert after["bytes"] <= own + size
    finally:
        worker_group(ONE).close()


@pytest.mark.parametrize("name", ["Ulysses 2", "Ring 2"])
def test_flux_exchanges_nothing_for_a_picture(tmp_path, name):
    """Each rank asks for its own tokens, with all heads: counted bytes of a step are those without it."""
    from benchmarks import traffic

    module = tiny.build(Flux(), traffic.CONFIG)
    file = tiny.write_native(Flux(), module, traffic.CONFIG, tmp_path / "flux.safetensors")
    model = tiny.TinyModel(Flux(), traffic.CONFIG, module, tmp_path, file)
    adapter = write(model, 1, tmp_path / "adapter.safetensors")
    picture = ImagePrompt(IPAdapterFile.of(adapter), encoded(model).image_embeds, 1.0)

    plain, prompted = (traffic.per_step(file, LAYOUTS[name], given) for given in ((), (picture,)))

    assert prompted == plain


# ---------------------------------------------------------------------- words between host and ranks


def test_which_rows_are_negative():
    assert negative_rows([0], 2) == [False, False]
    assert negative_rows([1, 0], 4) == [True, True, False, False]
    for told in (None, [], [0, 1, 0]):
        with pytest.raises(InvalidInput, match="does not say which of them are of the negative"):
            negative_rows(told, 4)
    with pytest.raises(InvalidInput, match=r"uses 3 prompts.*use CFGGuider"):
        negative_rows([2, 0, 1], 3)


@pytest.mark.parametrize("kind, shift", [("flow", 3.0), ("exponential_flow", 1.15)])
def test_shares_of_a_run_as_noise_levels(kind, shift):
    sampling = Sampling(kind, shift, 1.0)
    assert [sampling.sigma_at(percent) for percent in (0.0, 1.0)] == [1.0, 0.0]
    table = [float(sampling.sigma(torch.tensor(1.0 - p, dtype=torch.float64))) for p in (0.2, 0.7)]
    assert [sampling.sigma_at(0.2), sampling.sigma_at(0.7)] == pytest.approx(table)


def test_pipefusion_is_refused_by_name(model, tmp_path):
    file = write(model, 1, tmp_path / "adapter.safetensors")
    with pytest.raises(InvalidInput, match=r"PipeFusion \(pipefusion_degree 2\).*set pipefusion_degree to 1"):
        applied(handle(model, ParallelConfig(pipefusion_degree=2)), file, encoded(model))
