"""PipeFusion: exact while it warms up, afterwards what its algorithm says; a stage has its blocks only."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.protocol.messages import Patch, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.patches import patch_set
from tests import tiny
from tests.pipefusion_runs import (
    ALL,
    DRIFT,
    EXACT,
    MODELS,
    drift,
    plain,
    request,
    simulated,
    uneven,
    write_models,
)
from tests.test_adapters import delta
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3
from worker.parallel.mesh import Mesh
from worker.parallel.pipefusion.cuts import block_names, divide
from worker.parallel.pipefusion.stage import Stage

TWO = ParallelConfig(pipefusion_degree=2)
LAYOUTS = {
    "2 stages": TWO,
    "4 stages": ParallelConfig(pipefusion_degree=4),
    "2 stages x CFG 2": ParallelConfig(pipefusion_degree=2, cfg_parallel_degree=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """Grouped by pytest, so that each layout's ranks start once."""
    return LAYOUTS[request.param]


on_two_stages = pytest.mark.parametrize("layout", ["2 stages"], indirect=True)


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change",
    [{}, {"size": (30, 26), "batch": 2, "text": (9, 9)}, {"batch": 3, "cfg": 1.0, "text": (1, 1)}],
    ids=["odd picture", "15 x 13 tokens, two pictures", "three pictures, no guidance"],
)
def test_full_warm_up_equals_diffusers(models, layout, name, change):
    asked = request(models[name], **change)
    assert drift(models[name], layout, asked, plain(models[name], asked), ALL) <= EXACT


@pytest.mark.parametrize("name", MODELS)
def test_drift_is_small_and_goes_with_warm_up(models, layout, name):
    asked = request(models[name], steps=8)
    expected = plain(models[name], asked)
    drifts = [drift(models[name], layout, asked, expected, warmup) for warmup in (1, 3, 6, 8)]
    assert DRIFT > drifts[0] > drifts[1] > drifts[2] > 10 * EXACT / 8
    assert drifts[3] <= EXACT


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_drift_is_the_algorithms(models, layout, name, cfg):
    """15 x 13 tokens in patches of several sizes, against one process that keeps stale keys and values."""
    asked = uneven(models[name], cfg)
    expected = simulated(models[name], asked, layout.pipefusion_degree)
    assert drift(models[name], layout, asked, expected, 1) <= EXACT
    assert drift(models[name], layout, asked, plain(models[name], asked), 1) > 10 * EXACT


@on_two_stages
@pytest.mark.parametrize("size", [(15, 13), (12, 14)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("name", MODELS)
def test_every_sampler_with_and_without_a_mask(models, name, sampler, size, layout):
    mask = (torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(2)) > 0.4).float()
    for given in (mask, None):
        asked = request(models[name], size, sampler=sampler, mask=given, batch=2)
        expected = plain(models[name], asked)
        assert drift(models[name], TWO, asked, expected, ALL) <= EXACT
        assert EXACT < drift(models[name], TWO, asked, expected, 1) < DRIFT


# ---------------------------------------------------------------------- life


def test_progress_previews_and_interrupt(models, layout):
    asked = request(models["flux"], steps=3000)
    remote, seen = RemoteModel(asked.spec, layout), []
    pids = worker_group(layout).pids
    with pytest.raises(Interrupted, match="at step"):
        remote.sample(
            replace(asked, previews=True),
            on_progress=lambda p: seen.append((p, time.monotonic())),
            interrupted=lambda: len(seen) >= 5,
        )
    assert [p.step for p, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) < 300, "at 50 ms between looks at the flag, some small steps may pass"
    assert all(p.preview.shape == asked.noise.shape and p.preview.isfinite().all() for p, _ in seen)
    short = request(models["flux"])
    assert drift(models["flux"], layout, short, plain(models["flux"], short), ALL) <= EXACT
    assert worker_group(layout).pids == pids


@on_two_stages
def test_previews_are_the_denoised_latents(models, layout):
    asked, seen = request(models["sd3.5"], steps=2, cfg=1.0), []
    remote = RemoteModel(asked.spec, replace(TWO, warmup_steps=ALL))
    remote.sample(replace(asked, previews=True), on_progress=seen.append)
    x = torch.nn.functional.pad(asked.noise, (0, 1, 0, 1), mode="circular")
    output = tiny.reference(
        models["sd3.5"].family, models["sd3.5"].module, x, torch.tensor([1000.0]), asked.positive
    )
    assert tiny.relative_l2(seen[0].preview, asked.noise - output[..., :15, :13]) <= EXACT


# ---------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """12 blocks, of which the last is smaller."""
    config = tiny.SD3_CONFIG | {"num_layers": 12}
    module = tiny.build(SD3(), config)
    return module, tiny.write_native(
        SD3(), module, config, tmp_path_factory.mktemp("twelve") / "12.safetensors"
    )


@pytest.mark.parametrize("layout", ["2 stages", "4 stages"], indirect=True)
def test_a_rank_holds_its_share_of_the_weights(twelve, layout):
    """What the ranks say they hold."""
    (module, file), held = twelve, []
    remote = RemoteModel(ModelSpec.of(file, "transformer"), layout)
    remote.load()
    for rank in range(layout.world_size):
        told = worker_group(layout).call(Status(), ranks=(rank,)).value
        held += [m["bytes"] for m in told["models"] if m["name"] == file.name]
    blocks = sum(p.nbytes for p in module.transformer_blocks.parameters())
    assert len(held) == layout.pipefusion_degree and sum(held) >= blocks
    assert max(held) <= 1.1 * blocks / layout.pipefusion_degree


FLUX_DEV = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
              "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}  # fmt: skip


@pytest.mark.parametrize(("family", "config"), [(Flux(), FLUX_DEV), (SD3(), SD35_LARGE)])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_of_the_published_models_are_even(family, config, stages):
    held = []
    for index in range(stages):
        with torch.device("meta"):
            module = family.build(config)
        lists = [module.get_submodule(name) for name in block_names(module, family.plan)]
        blocks = sum(p.numel() for part in lists for p in part.parameters())
        stage = Stage(module, family.plan, family.name, index, stages, Mesh())
        assert len(stage.cuts.runs) == stages and all(stage.cuts.runs)
        held.append(sum(p.numel() for p in module.parameters()))
    assert max(held) <= 1.1 * blocks / stages


def test_blocks_are_divided_as_evenly_as_they_go():
    assert divide([1] * 7, 2) == [range(4), range(4, 7)] or divide([1] * 7, 2) == [range(3), range(3, 7)]
    assert divide([3, 3, 1, 1, 1, 1, 1, 1], 2) == [range(2), range(2, 8)]
    assert divide([1, 1, 9], 3) == [range(1), range(1, 2), range(2, 3)]


# Of the first stage, and of the last.
KEYS = {
    "sd3.5": ("joint_blocks.0.x_block.attn.qkv", "context_embedder", "joint_blocks.6.x_block.mlp.fc1"),
    "flux": ("double_blocks.0.img_attn.qkv", "single_blocks.3.linear1", "final_layer.linear"),
}


@on_two_stages
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_weights_of_several_stages(models, name, layout):
    model, asked = models[name], request(models[name])
    native = tiny.native_state_dict(model.family, model.module, model.config)
    weights = {}
    for i, key in enumerate(f"{weight}.weight" for weight in KEYS[name]):
        g = torch.Generator().manual_seed(i)
        up, down = (
            torch.randn(native[key].shape[0], 4, generator=g),
            torch.randn(4, native[key].shape[1], generator=g),
        )
        weights[key] = (Patch("lora", {"up": up, "down": down / 64}, 1.0, alpha=2.0),)
        native[key] = native[key] + delta(weights[key][0])
    changed = tiny.build(model.family, model.config)
    changed.load_state_dict({
        key: _swapped(native[s.key][s.start : s.stop], s.swap)
        for key, s in model.family.native_mapping(dict(changed.config)).items()
    })  # fmt: skip
    base, expected = plain(model, asked), plain(replace(model, module=changed), asked)
    patched = replace(asked, patches=patch_set(weights))
    assert tiny.relative_l2(expected, base) > 100 * EXACT, "the patch would not be missed"
    assert drift(model, TWO, patched, expected, ALL) <= EXACT
    assert drift(model, TWO, asked, base, ALL) <= EXACT


def _swapped(tensor: torch.Tensor, swap: bool) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if swap else tensor


# ---------------------------------------------------------------------- refusals


@on_two_stages
def test_what_it_cannot_do_is_refused_and_the_ranks_go_on(models, layout):
    model = models["sd3.5"]
    asked, remote = request(model), RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    remote.load()
    pids = worker_group(TWO).pids
    x, t = asked.noise, torch.ones(1)
    with pytest.raises(InvalidInput, match=r"pipefusion_degree 2.*use xDiT Sampler \(XDiTSampler\)"):
        remote.denoise(x, t, asked.positive)
    with pytest.raises(InvalidInput, match=r"ControlNet.*set pipefusion_degree to 1"):
        remote.denoise(x, t, asked.positive, control={"output": [x]})
    with pytest.raises(InvalidInput, match=r"sampler 'ddim' does not run"):
        remote.sample(replace(asked, sampler="ddim"))
    with pytest.raises(InvalidInput, match="the picture has 1 token, and pipefusion_degree 2 needs one"):
        remote.sample(request(model, (2, 2)))
    with pytest.raises(InvalidInput, match="has positions for 512 x 512; draw a smaller picture"):
        remote.sample(request(model, (66, 2)))
    misfit = Patch("lora", {"up": torch.zeros(3, 4), "down": torch.zeros(4, 5)}, 1.0)
    with pytest.raises(InvalidInput, match=r"does not fit joint_blocks\.6\."):  # of the last stage only
        remote.sample(replace(asked, patches=patch_set({"joint_blocks.6.x_block.mlp.fc1.weight": (misfit,)})))
    with pytest.raises(InvalidInput, match=r"8 is more than the 7 blocks of this sd3.*to 7 or less"):
        RemoteModel(remote.spec, ParallelConfig(pipefusion_degree=8)).load()
    flux = models["flux"]
    references = request(flux, cfg=1.0).positive | {"ref_latents": [x]}
    with pytest.raises(InvalidInput, match="reference latents under PipeFusion"):
        RemoteModel(ModelSpec.of(flux.file, "transformer"), TWO).sample(
            replace(request(flux, cfg=1.0), positive=references)
        )
    assert drift(model, TWO, asked, plain(model, asked), ALL) <= EXACT
    assert worker_group(TWO).pids == pids


def test_no_warm_up_is_refused():
    with pytest.raises(InvalidInput, match=r"warmup_steps is 0.*Set it to 1 or more"):
        ParallelConfig(pipefusion_degree=2, warmup_steps=0).check(("cpu",) * 2)
