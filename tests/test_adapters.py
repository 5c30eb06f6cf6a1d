"""Weight patches in the ranks, without ComfyUI: added, changed, removed, and what it costs."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import psutil
import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import NO_PATCHES, Keep, Known, Patch
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.patches import patch_set
from comfy_xdit.remote.sent import SentPatches
from tests import tiny
from worker.checkpoints import Checkpoint
from worker.patches.lora_files import LoraFiles
from worker.patches.weights import PatchedWeights, PatchStore

TWO = ParallelConfig(ulysses_degree=2)
RANK = 4
PER_CALL = 1e-5
# A fused projection, one whose halves diffusers swaps, and a bias, by family.
KEYS = {
    "sd3": (
        "joint_blocks.0.x_block.attn.qkv.weight",
        "final_layer.adaLN_modulation.1.weight",
        "joint_blocks.1.x_block.mlp.fc1.bias",
    ),
    "flux": (
        "single_blocks.0.linear1.weight",
        "final_layer.adaLN_modulation.1.weight",
        "double_blocks.0.img_mlp.0.bias",
    ),
}


def lora(shape: torch.Size, seed: int, strength: float = 1.0) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return Patch("diff", {"value": torch.randn(shape, generator=generator) / 4}, strength)
    up = torch.randn(shape[0], RANK, generator=generator)
    down = torch.randn(RANK, shape[1], generator=generator) / 4 / shape[1] ** 0.5
    return Patch("lora", {"up": up, "down": down}, strength, alpha=2.0)


def patches(model, seed: int = 0, strength: float = 1.0) -> dict[str, tuple[Patch, ...]]:
    native = tiny.native_state_dict(model.family, model.module, model.config)
    return {
        key: (lora(native[key].shape, seed + i, strength),) for i, key in enumerate(KEYS[model.family.name])
    }


def delta(patch: Patch) -> torch.Tensor:
    if patch.kind == "diff":
        return patch.strength * patch.tensors["value"]
    return patch.strength * patch.alpha / RANK * (patch.tensors["up"] @ patch.tensors["down"])


def expected(model, weights: dict[str, tuple[Patch, ...]], inputs) -> torch.Tensor:
    """Plain diffusers with the changed weights, which went through the file format of the release."""
    native = tiny.native_state_dict(model.family, model.module, model.config)
    for key, group in weights.items():
        native[key] = native[key] + sum(delta(patch) for patch in group)
    module = tiny.build(model.family, model.config)
    state = {}
    for name, source in model.family.native_mapping(dict(module.config)).items():
        part = native[source.key][source.start : source.stop]
        state[name] = torch.cat(part.chunk(2)[::-1]) if source.swap else part
    module.load_state_dict(state)
    return tiny.reference(model.family, module, *inputs)


@pytest.fixture(params=KEYS)
def model(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture
def inputs(model):
    x = torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((1,), 0.7 * (1.0 if model.family.name == "flux" else 1000.0))
    return x, timestep, tiny.conditions(model.family, model.config, 9)


@pytest.mark.parametrize("naming", ["file", "folder"])
def test_added_changed_and_removed(model, inputs, naming):
    remote = RemoteModel(ModelSpec.of(getattr(model, naming), "transformer"), TWO)
    base = remote.denoise(*inputs)
    first, second = patches(model), patches(model, seed=9, strength=-0.7)
    both = {key: first[key] + second[key] for key in first}
    for weights in (first, both, second):
        remote.patches = patch_set(weights)
        wanted = expected(model, weights, inputs)
        assert tiny.relative_l2(remote.denoise(*inputs), wanted) <= PER_CALL
        assert tiny.relative_l2(base, wanted) > 1e3 * PER_CALL, "the patch would not be missed"
    remote.patches = NO_PATCHES
    assert torch.equal(remote.denoise(*inputs), base), "the base comes from the file: the same bits"


def test_two_handles_of_one_model_alternate(model, inputs):
    spec = ModelSpec.of(model.file, "transformer")
    plain, patched = RemoteModel(spec, TWO), RemoteModel(spec, TWO, patches=patch_set(patches(model)))
    base, changed = plain.denoise(*inputs), patched.denoise(*inputs)
    assert torch.equal(plain.denoise(*inputs), base)
    assert torch.equal(patched.denoise(*inputs), changed)


def test_new_processes_get_the_patches_again(model, inputs):
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO, patches=patch_set(patches(model)))
    before = remote.denoise(*inputs)
    worker_group(TWO).close()
    assert torch.equal(remote.denoise(*inputs), before)


def test_a_patch_of_another_model_is_refused_and_leaves_no_trace(model, inputs):
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    base, pids = remote.denoise(*inputs), list(worker_group(TWO).pids)
    good, key = patches(model), KEYS[model.family.name][0]
    for weights, words in (
        ({**good, key: (lora(torch.Size([7, 5]), 1),)}, rf"lora patch does not fit {key}.*\(7, 5\)"),
        ({**good, "input_blocks.1.weight": good[key]}, r"patch is for input_blocks.1.weight, which this"),
        ({**good, key: (replace(good[key][0], offset=(0, 1000, 1000)),)}, "1000 slices of dimension 0"),
    ):
        remote.patches = patch_set(weights)
        with pytest.raises(InvalidInput, match=words):
            remote.denoise(*inputs)
    remote.patches = NO_PATCHES
    assert torch.equal(remote.denoise(*inputs), base)
    assert worker_group(TWO).pids == pids


def test_memory_of_the_ranks_does_not_grow(model, inputs, monkeypatch):
    monkeypatch.setattr("comfy_xdit.remote.sent.KEPT_BYTES", 1 << 20)
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), ParallelConfig())
    key = KEYS[model.family.name][0]
    sizes = []
    for turn in range(24):
        weights = patches(model, seed=turn)
        (patch,) = weights[key]
        # 6 to 7 MB that change nothing, and are other bytes each time
        up = torch.nn.functional.pad(patch.tensors["up"], (0, 2000), value=float(turn))
        down = torch.nn.functional.pad(patch.tensors["down"], (0, 0, 0, 2000))
        weights[key] = (replace(patch, tensors={"up": up, "down": down}),)
        remote.patches = patch_set(weights)
        remote.denoise(*inputs)
        remote.patches = NO_PATCHES
        remote.denoise(*inputs)
        sizes.append(psutil.Process(worker_group(ParallelConfig()).pids[0]).memory_info().rss)
    assert max(sizes[12:]) - max(sizes[:12]) < 16 << 20, [size >> 20 for size in sizes]


# ---------------------------------------------------------------------- the least work


@pytest.fixture
def loaded(model):
    """A model's weights in this process, with the store of one rank."""
    checkpoint = Checkpoint.at(model.file)
    config = model.family.config(checkpoint.shapes)
    mapping = model.family.mapping(checkpoint.shapes, config)
    weights = checkpoint.tensors(mapping, torch.float32)
    native = model.family.native_mapping(config)
    loras = LoraFiles.of(model.family, config, checkpoint.shapes)
    patched = PatchedWeights(weights, native, checkpoint, mapping, torch.float32, loras)
    return patched, weights, PatchStore()


def test_only_weights_whose_patches_differ_are_written(model, loaded):
    patched, weights, store = loaded
    before = {name: tensor.clone() for name, tensor in weights.items()}
    one = patches(model)
    key = KEYS[model.family.name][2]
    other = {**one, key: (replace(one[key][0], strength=0.5),)}

    def written(wanted) -> int:
        store.take(patch_set(wanted))
        return patched.apply(patch_set(wanted).name, store)

    counts = [written(w) for w in (one, one, other, one, {key: one[key]}, {}, {})]
    assert counts == [3, 0, 1, 1, 2, 1, 0]
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_a_file_that_changed_is_not_mixed_with_what_was_loaded(model, tmp_path):
    file = shutil.copy(model.file, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.at(file)
    config = model.family.config(checkpoint.shapes)
    mapping = model.family.mapping(checkpoint.shapes, config)
    native = model.family.native_mapping(config)
    loras = LoraFiles.of(model.family, config, checkpoint.shapes)
    patched = PatchedWeights({}, native, checkpoint, mapping, torch.float32, loras)
    store, wanted = PatchStore(), patch_set(patches(model))
    store.take(wanted)
    os.utime(file, ns=(1, 1))
    with pytest.raises(InvalidInput, match=r"model.safetensors was changed.*run the loader node again"):
        patched.apply(wanted.name, store)


def test_content_travels_once_and_a_shared_tensor_once(tiny_models, monkeypatch):
    model, sent, store = tiny_models["sd3"], SentPatches(), PatchStore()
    one, other = patch_set(patches(model)), patch_set(patches(model, strength=0.5))
    assert patch_set(patches(model)).name == one.name != other.name

    def kinds(message) -> set[type]:
        store.take(message)
        return {type(t) for ps in message.weights.values() for p in ps for t in p.tensors.values()}

    assert kinds(sent.refer(one, 1)) == {Keep}
    assert sent.refer(one, 1).weights is None
    assert kinds(sent.refer(other, 1)) == {Known}, "another strength, the same tensors"
    sent.reset()
    again = sent.refer(one, 1)
    assert kinds(again) == {Keep} and again.forget == (other.name,)
    monkeypatch.setattr("comfy_xdit.remote.sent.KEPT_BYTES", 0)
    third = patch_set(patches(model, seed=5))
    message = sent.refer(third, 1)
    assert kinds(message) == {Keep} and message.forget == (one.name,)
    assert set(store._sets) == {"", third.name} and len(store._tensors) == 5
    assert kinds(sent.refer(third, 2)) == {Keep}, "new processes hold nothing"


def test_too_many_patches_are_refused_by_number():
    patch = Patch("diff", {"value": torch.zeros(1)}, 1.0)
    with pytest.raises(InvalidInput, match="make 6001 patches, at most 6000"):
        patch_set({"img_in.weight": (patch,) * 6001})
