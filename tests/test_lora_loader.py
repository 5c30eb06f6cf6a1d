"""XDiTLoraLoader without ComfyUI: parity with diffusers in every naming, stacks, changes, removal."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.lora import add_lora, words
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import lora_files, tiny
from tests.lora_files import NAMINGS, merged, write
from tests.pipefusion_runs import ALL, plain, request

PER_CALL, PER_RUN = 1e-5, 1e-4
ONE = ParallelConfig()
LAYOUTS = {
    "1 rank": ONE,
    "Ulysses 2": ParallelConfig(ulysses_degree=2),
    "Ring 2": ParallelConfig(ring_degree=2),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2),
    "CFG 2 x Ulysses 2": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2),
}
FAMILIES = ("sd3", "flux")


@pytest.fixture(params=FAMILIES)
def model(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


@pytest.fixture
def inputs(model):
    return given(model)


def given(model, batch: int = 2):
    """A batch, so that CFG parallel has something to share."""
    x = torch.randn(batch, 16, 10, 14, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((batch,), 0.7 * (1.0 if model.family.name == "flux" else 1000.0))
    return x, timestep, tiny.conditions(model.family, model.config, 9, batch)


def handle(model, parallel=ONE, naming: str = "file") -> RemoteModel:
    return RemoteModel(ModelSpec.of(getattr(model, naming), "transformer"), parallel)


def loaded(remote: RemoteModel, path, strength: float) -> RemoteModel:
    """The MODEL that the node gives, without ComfyUI."""
    return add_lora(remote, str(path), strength, HEADLESS)[0]


def saved(tensors, path):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def error(remote: RemoteModel, module: torch.nn.Module, model, inputs) -> float:
    return tiny.relative_l2(remote.denoise(*inputs), tiny.reference(model.family, module, *inputs))


# ---------------------------------------------------------------------- parity


def test_stack_change_and_removal_on_every_layout(model, layout, inputs, tmp_path):
    base = handle(model, layout)
    plain = base.denoise(*inputs)
    first, change = write(model, NAMINGS["kohya"], 1)
    second, other = write(model, NAMINGS["diffusers"], 2)
    one, two = saved(first, tmp_path / "one.safetensors"), saved(second, tmp_path / "two.safetensors")
    for stack in ([(one, change, 1.0)], [(one, change, -0.7)], [(one, change, 0.5), (two, other, 1.3)]):
        remote = base
        for path, _, strength in stack:
            remote = loaded(remote, path, strength)
        module = merged(model, *((delta, strength) for _, delta, strength in stack))
        assert error(remote, module, model, inputs) <= PER_CALL
        assert tiny.relative_l2(plain, tiny.reference(model.family, module, *inputs)) > 1e3 * PER_CALL
    assert loaded(base, one, 0.0) is base
    assert torch.equal(base.denoise(*inputs), plain), "without the LoRA: the same bits as before"


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(model, inputs, tmp_path, naming):
    tensors, change = write(model, NAMINGS[naming], 3)
    path = saved(tensors, tmp_path / "lora.safetensors")
    base = handle(model)
    remote, text = add_lora(base, str(path), 0.8, HEADLESS)
    assert error(remote, merged(model, (change, 0.8)), model, inputs) <= PER_CALL
    assert text == f"lora.safetensors changes {len(lora_files.TABLES[model.family.name])} weights."


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_model_in_a_diffusers_folder(model, inputs, tmp_path, naming):
    tensors, change = write(model, NAMINGS[naming], 3)
    remote = loaded(handle(model, naming="folder"), saved(tensors, tmp_path / "lora.safetensors"), -0.8)
    assert error(remote, merged(model, (change, -0.8)), model, inputs) <= PER_CALL


def test_xlabs_equals_the_table_and_diffusers_own_converter(tiny_models, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    model = tiny_models["flux"]
    inputs = given(model)
    tensors, change = lora_files.xlabs(model, 4)
    remote = loaded(handle(model), saved(tensors, tmp_path / "xlabs.safetensors"), 0.9)
    assert error(remote, merged(model, (change, 0.9)), model, inputs) <= PER_CALL
    converted = {f"{k}": v for k, v in _convert_xlabs_flux_lora_to_diffusers(dict(tensors)).items()}
    by_diffusers = loaded(handle(model), saved(converted, tmp_path / "converted.safetensors"), 0.9)
    assert error(by_diffusers, merged(model, (change, 0.9)), model, inputs) <= PER_CALL


def test_equals_diffusers_own_loading(model, inputs, tmp_path):
    pytest.importorskip("peft")
    tensors, _ = write(model, NAMINGS["diffusers"], 5)
    module = tiny.build(model.family, model.config)
    module.load_lora_adapter(dict(tensors), prefix="transformer")
    remote = loaded(handle(model), saved(tensors, tmp_path / "lora.safetensors"), 1.0)
    assert error(remote, module, model, inputs) <= PER_CALL


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_on_a_file_of_fp8(model, inputs, tmp_path, kind):
    """The change is added to what the fp8 numbers mean, not rounded to fp8 again."""
    stored = {name: tensor.to(kind) for name, tensor in load_file(model.file).items()}
    module = copy.deepcopy(model.module)
    module.load_state_dict({name: tensor.to(kind).float() for name, tensor in module.state_dict().items()})
    fp8 = replace(model, module=module, file=saved(stored, tmp_path / "fp8.safetensors"))
    tensors, change = write(fp8, NAMINGS["kohya"], 3)
    base, lora = handle(fp8, ParallelConfig(ulysses_degree=2)), saved(tensors, tmp_path / "lora.safetensors")
    assert error(base, module, fp8, inputs) <= PER_CALL
    assert error(loaded(base, lora, 0.8), merged(fp8, (change, 0.8)), fp8, inputs) <= PER_CALL
    assert error(base, module, fp8, inputs) <= PER_CALL


def test_biases_norms_and_whole_weights(model, inputs, tmp_path):
    """What a BFL Control LoRA and LyCORIS files hold besides matrices of low rank."""
    random = torch.Generator().manual_seed(6)
    native, ours, norm, our_norm = {
        "sd3": ("final_layer.linear", "proj_out", "joint_blocks.0.x_block.attn.ln_q.weight", "norm_q"),
        "flux": (
            "final_layer.linear",
            "proj_out",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "norm_q",
        ),
    }[model.family.name]
    module = tiny.build(model.family, model.config)
    layer = module.get_submodule(ours)
    head = module.get_submodule(f"transformer_blocks.0.attn.{our_norm}").weight
    difference = torch.randn(layer.weight.shape, generator=random) / 20
    shift = torch.randn(layer.bias.shape, generator=random) / 4
    new_norm = torch.rand(head.shape, generator=random) + 0.5
    layer.weight.data += 0.6 * difference
    layer.bias.data += 0.6 * shift
    head.data.copy_(new_norm)
    set_name = (
        norm if norm.endswith(".scale") else f"diffusion_model.{norm.removesuffix('.weight')}.set_weight"
    )
    tensors = {f"{native}.diff": difference, f"{native}.lora_B.bias": shift, set_name: new_norm}
    remote = loaded(handle(model), saved(tensors, tmp_path / "whole.safetensors"), 0.6)
    assert error(remote, module, model, inputs) <= PER_CALL


def test_under_pipefusion_each_stage_changes_its_own_blocks(model, tmp_path):
    """PipeFusion is exact where every step is a warm-up: the run equals plain diffusers."""
    base = handle(model, ParallelConfig(pipefusion_degree=2, warmup_steps=ALL))
    asked = request(model)
    plain_run = base.sample(asked)
    tensors, change = write(model, NAMINGS["diffusers"], 10)
    remote, text = add_lora(base, str(saved(tensors, tmp_path / "lora.safetensors")), 0.8, HEADLESS)
    assert "Left out" not in text, "what one stage lacks another one has"
    expected = plain(replace(model, module=merged(model, (change, 0.8))), asked)
    assert tiny.relative_l2(remote.sample(replace(asked, patches=remote.patches)), expected) <= PER_RUN
    assert tiny.relative_l2(plain_run, expected) > 100 * PER_RUN
    assert torch.equal(base.sample(asked), plain_run)


# ---------------------------------------------------------------------- what it costs, and what is told


def test_strengths_change_without_reading_the_model_again(model, inputs, tmp_path):
    tensors, change = write(model, NAMINGS["kohya"], 7)
    path, base = saved(tensors, tmp_path / "lora.safetensors"), handle(model)
    base.denoise(*inputs)
    status = worker_group(ONE).call(Status()).value
    for strength in (0.3, -1.0, 2.0):
        remote = loaded(base, path, strength)
        assert error(remote, merged(model, (change, strength)), model, inputs) <= PER_CALL
        assert all(not patch.tensors for group in remote.patches.weights.values() for patch in group)
    after = worker_group(ONE).call(Status()).value
    assert after["loads"] == status["loads"]
    assert after["patches"] == status["patches"], "no tensor of the file travelled, none is kept"


def test_the_same_file_twice_and_two_handles_in_turn(model, inputs, tmp_path):
    tensors, change = write(model, NAMINGS["kohya"], 8)
    path, base = saved(tensors, tmp_path / "lora.safetensors"), handle(model)
    once = loaded(base, path, 0.4)
    twice = loaded(once, path, 0.2)
    for remote, strength in ((once, 0.4), (twice, 0.6), (base, 0.0), (twice, 0.6), (once, 0.4)):
        assert error(remote, merged(model, (change, strength)), model, inputs) <= PER_CALL


def test_new_processes_read_the_file_again(model, inputs, tmp_path):
    tensors, _ = write(model, NAMINGS["kohya"], 9)
    remote = loaded(handle(model), saved(tensors, tmp_path / "lora.safetensors"), 1.0)
    before = remote.denoise(*inputs)
    worker_group(ONE).close()
    assert torch.equal(remote.denoise(*inputs), before)


def test_what_matches_nothing_is_named(model, tmp_path, caplog):
    tensors, _ = write(model, NAMINGS["kohya"], 1)
    matched = len(lora_files.TABLES[model.family.name])
    tensors |= {f"lora_te1_layer_{n}.lora_up.weight": torch.zeros(2, 2) for n in range(3)}
    tensors |= {"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2), "strange": torch.zeros(1)}
    path = saved(tensors, tmp_path / "lora.safetensors")
    _, text = add_lora(handle(model), str(path), 1.0, HEADLESS)
    assert text == (
        f"lora.safetensors changes {matched} weights. Left out, since they match nothing: 2 tensors "
        "(lora_unet_nowhere.lora_up.weight, strange). Left out, for text encoders: 3 tensors."
    )
    assert text in caplog.text
    many = {"weights": ["a"], "unmatched": list("bcdefgh"), "text_encoders": 1}
    assert words("x", many) == (
        "x changes 1 weight. Left out, since they match nothing: 7 tensors (b, c, d, e, f and 2 more). "
        "Left out, for text encoders: 1 tensor."
    )


@pytest.mark.parametrize("when", ["changed", "gone"])
def test_a_file_that_changes_after_the_node_is_refused_and_nothing_is_lost(model, inputs, tmp_path, when):
    base = handle(model, ParallelConfig(ulysses_degree=2))
    plain, pids = base.denoise(*inputs), list(worker_group(base.parallel).pids)
    tensors, _ = write(model, NAMINGS["kohya"], 1)
    path = saved(tensors, tmp_path / "lora.safetensors")
    remote = loaded(base, path, 1.0)
    os.utime(path, ns=(1, 1)) if when == "changed" else path.unlink()
    with pytest.raises(InvalidInput, match=r"was changed after|no LoRA file at"):
        remote.denoise(*inputs)
    assert torch.equal(base.denoise(*inputs), plain)
    assert worker_group(base.parallel).pids == pids
