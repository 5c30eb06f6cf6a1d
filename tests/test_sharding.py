"""Weights spread over ranks: exact, whoever calls how often, patched, and no more in a rank than its part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.parity import PER_CALL, SIZES, fewest_tokens, multiplier, one_call
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import NO_PATCHES, Patch, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.patches import patch_set
from tests import pipefusion_runs as runs
from tests import tiny
from tests.test_adapters import KEYS, expected, patches
from worker.checkpoints import Checkpoint, Part, Source
from worker.models.sd3.family import SD3
from worker.parallel.pipefusion.cuts import block_names
from worker.parallel.sharding import ShardedWeights

MODELS = ("sd3", "sd3.5-medium", "flux")
LAYOUTS = {
    "Ulysses 2": ParallelConfig(ulysses_degree=2, shard_weights=True),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2, shard_weights=True),
    "data 2 x Ring 2": ParallelConfig(data_parallel_degree=2, ring_degree=2, shard_weights=True),
}
DEEP = tiny.SD3_CONFIG | {"num_layers": 40, "num_attention_heads": 2, "caption_projection_dim": 128}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


def inputs(model, batch: int = 1, text: int = 9):
    x = torch.randn(batch, 16, 10, 14, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((batch,), 0.7 * multiplier(model))
    return x, timestep, tiny.conditions(model.family, model.config, text, batch)


def remote_of(model, layout: ParallelConfig, dtype: str = "default") -> RemoteModel:
    return RemoteModel(ModelSpec.of(model.file, "transformer", dtype), layout)


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", MODELS)
def test_calls_equal_diffusers(tiny_models, layout, name):
    for size in SIZES:
        error = one_call(tiny_models[name], tiny_models[name].file, layout, size)
        if error is None:
            assert size.tokens < fewest_tokens(layout)
        else:
            assert error <= PER_CALL, f"{size}: {error:.1e}"


@pytest.mark.parametrize("lengths", [(5,), (5, 12), (12, 5, 5), (5, 12, 5)], ids=str)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_branches_that_call_differently_often_wait_for_nobody(tiny_models, layout, name, lengths):
    """Rows that do not divide, prompts of several lengths on one branch only."""
    model, batch = tiny_models[name], len(lengths)
    x, timestep, _ = inputs(model, batch)
    single = [tiny.conditions(model.family, model.config, n, seed=i) for i, n in enumerate(lengths)]
    wanted = torch.cat([
        tiny.reference(model.family, model.module, x[i : i + 1], timestep[i : i + 1], given)
        for i, given in enumerate(single)
    ])  # fmt: skip
    most = max(lengths)
    padded = [torch.nn.functional.pad(c["context"], (0, 0, 0, most - c["context"].shape[1])) for c in single]
    given = {part: torch.cat([one[part] for one in single]) for part in single[0] if part != "context"}
    given |= {"context": torch.cat(padded), "context_lengths": torch.tensor(lengths)}
    remote = remote_of(model, layout)
    for _ in range(2):
        assert tiny.relative_l2(remote.denoise(x, timestep, given), wanted) <= PER_CALL


@pytest.mark.parametrize("layout", ["Ulysses 2", "CFG 2"], indirect=True)
def test_residuals_and_reference_latents(tiny_models, layout):
    model = tiny_models["flux"]
    x, timestep, given = inputs(model, 2)
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    g = torch.Generator().manual_seed(3)
    residuals = [torch.randn(2, 35, width, generator=g) for _ in range(5)]
    call = model.family.call(dict(model.module.config), x, timestep, given)
    with torch.no_grad():
        (sample,) = model.module(
            **call.kwargs, return_dict=False,
            controlnet_block_samples=residuals[:2], controlnet_single_block_samples=residuals[2:],
        )  # fmt: skip
    wanted = model.family.output(dict(model.module.config), sample, x)
    remote = remote_of(model, layout)
    actual = remote.denoise(x, timestep, given, control={"input": residuals[:2], "output": residuals[2:]})
    assert tiny.relative_l2(actual, wanted) <= PER_CALL

    given |= {"ref_latents": [torch.randn(2, 16, 9, 4, generator=g)]}
    wanted = tiny.reference(model.family, model.module, x, timestep, given)
    assert tiny.relative_l2(remote.denoise(x, timestep, given), wanted) <= PER_CALL


@pytest.mark.parametrize("layout", ["Ulysses 2"], indirect=True)
def test_low_precision_gives_the_bits_of_whole_weights(tiny_models, layout):
    handles, layouts = [], (layout, replace(layout, shard_weights=False))  # held: both groups stay
    for model in (tiny_models[name] for name in MODELS):
        for dtype in ("bf16", "fp16"):
            handles += [remote_of(model, one, dtype) for one in layouts]
            sharded, whole = (remote.denoise(*inputs(model, 2)) for remote in handles[-2:])
            assert torch.equal(sharded, whole), f"{model.file.name} {dtype}"


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize(("name", "naming"), [("sd3", "file"), ("flux", "folder")])
@pytest.mark.parametrize("layout", ["Ulysses 2", "data 2 x Ring 2"], indirect=True)
def test_lora_added_changed_and_removed(tiny_models, layout, name, naming):
    model = tiny_models[name]
    arguments = inputs(model)
    remote = RemoteModel(ModelSpec.of(getattr(model, naming), "transformer"), layout)
    base = remote.denoise(*arguments)
    first, second = patches(model), patches(model, seed=9, strength=-0.7)
    for weights in (first, {key: first[key] + second[key] for key in first}, second):
        remote.patches = patch_set(weights)
        wanted = expected(model, weights, arguments)
        assert tiny.relative_l2(remote.denoise(*arguments), wanted) <= PER_CALL
        assert tiny.relative_l2(base, wanted) > 1e3 * PER_CALL, "the patch would not be missed"
    remote.patches = NO_PATCHES
    assert torch.equal(remote.denoise(*arguments), base), "the base comes from the file: the same bits"


def test_a_part_is_the_part_of_the_whole(tiny_models):
    """Every cut of plain, fused and swapped tensors, also inside of rows."""
    model = tiny_models["flux"]
    checkpoint = Checkpoint.at(model.file)
    mapping = model.family.mapping(checkpoint.shapes, model.config)
    names = ("norm_out.linear.bias", "norm_out.linear.weight", "transformer_blocks.0.attn.to_k.weight")
    for name in names:
        whole = checkpoint.tensors({name: mapping[name]}, torch.float32)[name].reshape(-1)
        size = len(whole)
        for start, stop in (
            (0, size),
            (1, 2),
            (5, size // 2),
            (size // 2 - 3, size // 2 + 3),
            (size - 1, size),
        ):
            parts = dict(checkpoint.parts({name: Part(mapping[name], start, stop)}))
            assert torch.equal(parts[name], whole[start:stop]), (name, start, stop)
    odd = Source("img_in.bias", 1, 8, swap=False)
    (part,) = dict(checkpoint.parts({"odd": Part(odd, 2, 7)})).values()
    assert torch.equal(part, checkpoint.tensors({"odd": odd}, torch.float32)["odd"][2:7])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_of_all_ranks_make_the_weights_and_are_all_a_rank_keeps(deep, ranks, monkeypatch):
    checkpoint = Checkpoint.at(deep.file)
    mapping = deep.family.mapping(checkpoint.shapes, deep.family.config(checkpoint.shapes))
    rows, size = [], sum(p.nbytes for p in deep.module.parameters())
    for rank in range(ranks):
        module = deep.family.build(DEEP).requires_grad_(False)
        shards = ShardedWeights(module, block_names(module, deep.family.plan), ranks, torch.float32)
        monkeypatch.setattr(dist, "get_rank", lambda _group, rank=rank: rank)
        shards.load(module, checkpoint, mapping, None, torch.device("cpu"))
        views = [module.get_parameter(name) for name in shards.places]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*views, *shards._parts)}
        assert sum(storage.nbytes() for storage in storages.values()) == shards.nbytes
        assert shards.nbytes <= (1 / ranks + 0.1) * size
        rows.append(shards._parts)
    for number, parts in enumerate(zip(*rows, strict=True)):
        row = torch.cat(parts)
        for name, place in shards.places.items():
            if place.block == number:
                whole = deep.module.get_parameter(name)
                stored = row[place.start : place.stop].view(place.dtype)
                assert torch.equal(stored.view(place.shape), whole), name


def test_a_rank_holds_its_part_and_two_blocks(layout, deep):
    """What a rank counts of a model with many blocks: two of them, and all that is no block, are little."""
    arguments = inputs(deep, 2)
    wanted = tiny.reference(deep.family, deep.module, *arguments)
    remote = remote_of(deep, layout)
    assert tiny.relative_l2(remote.denoise(*arguments), wanted) <= PER_CALL
    group, whole = worker_group(layout), 4 * sum(p.numel() for p in deep.module.parameters())
    for rank in range(layout.world_size):
        models = group.call(Status(), ranks=(rank,)).value["models"]
        (held,) = [told["bytes"] for told in models if told["name"] == deep.file.name]
        assert 1 / layout.world_size < held / whole <= 1 / layout.world_size + 0.1


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    family, module = SD3(), tiny.build(SD3(), DEEP)
    file = tiny.write_native(family, module, DEEP, tmp_path_factory.mktemp("deep") / "deep.safetensors")
    return tiny.TinyModel(family, DEEP, module, file.parent, file)


# ---------------------------------------------------------------------- stages and refusals


@pytest.mark.parametrize("name", runs.MODELS)
def test_stages_whose_branches_share_their_weights(tmp_path, name):
    """Three rows on two branches: one makes a call more than the other, in every stage."""
    layout = ParallelConfig(pipefusion_degree=2, data_parallel_degree=2, shard_weights=True)
    model = runs.write_models(tmp_path)[name]
    for change in ({}, {"batch": 3, "cfg": 1.0, "text": (7, 7)}, {"batch": 3}):
        asked = runs.request(model, **change)
        assert runs.drift(model, layout, asked, runs.plain(model, asked), runs.ALL) <= PER_CALL
    asked = runs.uneven(model, 3.0)
    assert runs.drift(model, layout, asked, runs.simulated(model, asked, 2), 1) <= PER_CALL


def test_nobody_to_share_with_is_refused():
    for layout in (ParallelConfig(), ParallelConfig(pipefusion_degree=2)):
        with pytest.raises(InvalidInput, match=r"shard_weights spreads.*Set shard_weights to false"):
            replace(layout, shard_weights=True).check(("cpu",) * 2)


@pytest.mark.parametrize("layout", ["Ulysses 2", "CFG 2"], indirect=True)
def test_bad_input_costs_nothing(tiny_models, layout, tmp_path):
    model = tiny_models["sd3"]
    remote, arguments = remote_of(model, layout), inputs(model)
    first = remote.denoise(*arguments)
    pids = list(worker_group(layout).pids)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.file.read_bytes()[:100_000])
    with pytest.raises(InvalidInput, match="damaged"):
        RemoteModel(ModelSpec.of(cut, "transformer"), layout).load()
    x, timestep, given = arguments
    with pytest.raises(InvalidInput, match="takes"):
        remote.denoise(x[:, :4], timestep, given)
    misfit = Patch("lora", {"up": torch.zeros(3, 4), "down": torch.zeros(4, 5)}, 1.0)
    remote.patches = patch_set({KEYS["sd3"][0]: (misfit,)})
    with pytest.raises(InvalidInput, match="does not fit"):
        remote.denoise(*arguments)
    remote.patches = NO_PATCHES
    assert torch.equal(remote.denoise(*arguments), first)
    assert worker_group(layout).pids == pids
