"""Stock LoRA nodes on an xDiT MODEL: the same numbers as on the stock MODEL, or a refusal."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests import tiny
from tests.comfyui import loras
from tests.comfyui.inputs import (
    DEMO,
    FLUX_BYTES,
    FLUX_CONFIG,
    conditioning_for,
    empty_latent,
    layout,
    pair,
    random_latent,
    relative_l2,
)
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3

PER_CALL, PER_RUN = 1e-5, 1e-4
EXACT = 1e-6
SD3_CONFIG = {**tiny.SD3_CONFIG, "num_layers": 4}


def _pair(run_node, name: str, config: dict[str, Any], degrees: dict[str, int], **options: Any):
    """The same file as stock MODEL and as ours."""
    models = pair(run_node, name, degrees)
    models.config, models.options = config, options
    return models


@pytest.fixture
def sd3(run_node, tiny_sd3, degrees) -> SimpleNamespace:
    return _pair(run_node, tiny_sd3, SD3_CONFIG, degrees)


@pytest.fixture
def with_lora(run_node, comfyui):
    """with_lora(models, tensors, 0.5): the pair behind a stock LoRA node, with a file that it reads."""
    written: dict[int, str] = {}

    def add(models: SimpleNamespace, tensors: dict[str, torch.Tensor], strength: float) -> SimpleNamespace:
        name = written.setdefault(id(tensors), f"lora_{len(written)}.safetensors")
        save_file({k: t.contiguous() for k, t in tensors.items()}, comfyui.models / "loras" / name)
        settings = {"lora_name": name, "strength_model": strength}
        patched = SimpleNamespace(**vars(models))
        (patched.stock,) = run_node("LoraLoaderModelOnly", model=models.stock, **settings)
        (patched.ours,) = run_node("LoraLoaderModelOnly", model=models.ours, **settings)
        assert patched.ours.patches.keys() == patched.stock.patches.keys() and patched.ours.patches
        return patched

    return add


def _sample(run_node, models: SimpleNamespace, model: Any, node: str = "KSampler") -> torch.Tensor:
    (latent,) = run_node(
        node,
        model=model,
        seed=7,
        steps=3,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        positive=conditioning_for(models.config, 1, **models.options),
        negative=conditioning_for(models.config, 2, **models.options),
        latent_image=empty_latent(1, 10, 14),
    )
    return latent["samples"]


def _check(run_node, models: SimpleNamespace) -> torch.Tensor:
    """Both samplers on our MODEL agree with KSampler on the stock one; returns that one's latent."""
    expected = _sample(run_node, models, models.stock)
    for node in ("KSampler", "XDiTSampler"):
        assert relative_l2(_sample(run_node, models, models.ours, node), expected) <= PER_RUN, node
    return expected


def _call(models: SimpleNamespace, patcher: Any) -> torch.Tensor:
    """One call of the transformer of a loaded MODEL."""
    import comfy.model_management

    ((context, words),) = conditioning_for(models.config, 1, **models.options)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        extra = {k: torch.tensor([v]) for k, v in models.options.items()}
        # ComfyUI's default for transformer_options is one dict, into which its own models write.
        return patcher.model.apply_model(
            random_latent(),
            torch.tensor([0.7]),
            c_crossattn=context,
            y=words["pooled_output"],
            transformer_options={},
            **extra,
        )


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_native_names(run_node, sd3, with_lora, strength):
    patched = with_lora(sd3, loras.native(sd3.ours, "lora", 1), strength)

    assert relative_l2(_call(patched, patched.ours), _call(patched, patched.stock)) <= PER_CALL
    expected = _check(run_node, patched)
    assert relative_l2(expected, _sample(run_node, sd3, sd3.stock)) > 0.01, "it would be missed"


def test_stacked_in_both_namings_and_removed(run_node, sd3, with_lora):
    base = _sample(run_node, sd3, sd3.ours)
    one = with_lora(sd3, loras.native(sd3.ours, "lora", 1), 0.8)
    both = with_lora(one, loras.diffusers(SD3().build(SD3_CONFIG), 2), 0.6)

    assert relative_l2(_call(both, both.ours), _call(both, both.stock)) <= PER_CALL
    first, second = _check(run_node, one), _check(run_node, both)
    assert relative_l2(second, first) > 0.01
    assert relative_l2(_sample(run_node, one, one.ours), first) <= PER_RUN  # back to one
    assert relative_l2(_sample(run_node, sd3, sd3.ours), base) <= EXACT
    assert relative_l2(base, _sample(run_node, sd3, sd3.stock)) <= PER_RUN


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set"])
def test_kinds(run_node, sd3, with_lora, kind):
    # Rows of every layer divide by 4 and 8, as OFT's and BOFT's blocks need, in the blocks only.
    patched = with_lora(sd3, loras.native(sd3.ours, kind, 3, only="joint_blocks"), 0.7)

    expected = _check(run_node, patched)
    assert relative_l2(expected, _sample(run_node, sd3, sd3.stock)) > 1e-3


def test_two_models_in_one_graph(run_node, sd3, with_lora):
    one = with_lora(sd3, loras.native(sd3.ours, "lora", 1), 1.0)
    other = with_lora(sd3, loras.native(sd3.ours, "lora", 2, only="x_block"), -1.0)
    expected = [_sample(run_node, pair, pair.stock) for pair in (one, other, sd3)]

    for _ in range(2):
        for models, wanted in zip((one, other, sd3), expected, strict=True):
            for node in ("KSampler", "XDiTSampler"):
                assert relative_l2(_sample(run_node, models, models.ours, node), wanted) <= PER_RUN


def test_unloading_in_between(run_node, sd3, with_lora):
    import comfy.model_management

    patched = with_lora(sd3, loras.native(sd3.ours, "lora", 1), 1.0)
    before = _sample(run_node, patched, patched.ours)
    comfy.model_management.unload_all_models()

    assert torch.equal(_sample(run_node, patched, patched.ours), before)


def test_diffusers_named_model(run_node, comfyui, degrees, with_lora, tmp_path):
    name = "sd3_diffusers_lora.safetensors"
    module = tiny.build(SD3(), SD3_CONFIG)
    module.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(comfyui.models / "diffusion_models" / name)
    models = _pair(run_node, name, SD3_CONFIG, degrees)

    patched = with_lora(models, loras.native(models.ours, "lora", 1), 1.0)
    _check(run_node, with_lora(patched, loras.diffusers(module, 2), 0.5))


@pytest.mark.skipif(psutil.virtual_memory().available < FLUX_BYTES, reason="needs 12 GB of free memory")
def test_flux(run_node, flux_file, degrees, with_lora):
    models = _pair(run_node, flux_file.name, FLUX_CONFIG, degrees, guidance=2.5)
    base = _sample(run_node, models, models.ours)
    with torch.device("meta"):
        module = Flux().build(FLUX_CONFIG)
    one = with_lora(models, loras.native(models.ours, "lora", 1), 1.0)
    both = with_lora(one, loras.diffusers(module, 2), -0.5)

    assert relative_l2(_call(both, both.ours), _call(both, both.stock)) <= PER_CALL
    expected = _check(run_node, both)
    assert relative_l2(expected, base) > 0.01
    assert relative_l2(_sample(run_node, models, models.ours), base) <= EXACT


# ---------------------------------------------------------------------- each kind by itself


def _entries(kind: str, rows: int, columns: int, seed: int) -> list[Any]:
    """What ComfyUI reads from a file of this kind, for one weight."""
    import comfy.lora

    tensors = {f"x.{part}": t for part, t in loras.KINDS[kind](loras.Random(seed), rows, columns).items()}
    patch = comfy.lora.load_lora(tensors, {"x": "diffusion_model.x.weight"})
    return [patch["diffusion_model.x.weight"]]


def _compare(entries: list[tuple[Any, ...]], shape: tuple[int, ...]) -> float:
    """Relative L2 of the change in the ranks to that of ComfyUI."""
    import comfy.lora

    from comfy_xdit.comfy_types.model.patches import describe
    from worker.patches.adapters import patched
    from worker.patches.weights import PatchStore

    weight = loras.Random(0)(*shape, scale=0.5 / shape[-1] ** 0.5)
    expected = comfy.lora.calculate_weight(entries, weight.clone(), "diffusion_model.x.weight")
    described, store = describe({"diffusion_model.x.weight": entries}), PatchStore()
    store.take(described)
    patches = store.weights(described.name)["x.weight"]
    actual = patched("x", weight.clone(), patches, lambda p: store.tensors(p, torch.device("cpu")))
    assert not torch.equal(expected, weight)
    return relative_l2(actual - weight, expected - weight)


@pytest.mark.parametrize("kind", loras.KINDS)
@pytest.mark.parametrize("base", [1.0, 0.5])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_each_kind_equals_calculate_weight(comfyui, kind, strength, base):
    (what,) = _entries(kind, 48, 32, 1)
    assert _compare([(strength, what, base, None, None)], (48, 32)) <= PER_CALL
    (part,) = _entries(kind, 16, 32, 2)
    several = [(1.0, what, 1.0, None, None), (strength, part, base, (0, 16, 16), None)]
    assert _compare(several, (48, 32)) <= PER_CALL


def test_further_forms_equal_calculate_weight(comfyui):
    import comfy.utils
    import comfy.weight_adapter as adapters

    random, shape = loras.Random(5), (16, 8, 2, 2)
    up, down, mid = random(16, 4, 1, 1), random(4, 8, 1, 1), random(4, 4, 2, 2)
    core = random(4, 4, 2, 2), random(4, 4, 2, 2)
    hada = [random(4, 16), random(4, 8), random(4, 16), random(4, 8)]
    magnitude = 0.5 + 0.1 * random(1, 8)
    one = random(16, 4), random(4, 8)
    forms = [
        (adapters.LoRAAdapter(set(), (up, down, 2.0, mid, None, None)), shape),
        (adapters.LoRAAdapter(set(), (up, random(4, 8, 2, 2), None, None, None, None)), shape),
        (adapters.LoRAAdapter(set(), (*one, 2.0, None, magnitude, None)), (16, 8)),
        (adapters.LoHaAdapter(set(), (hada[0], hada[1], 2.0, hada[2], hada[3], *core, None)), shape),
        (adapters.LoKrAdapter(set(), (None, random(8, 4), 2.0, random(2, 1), random(1, 2), None, None,
                                      None, None)), (16, 8)),
        (adapters.GLoRAAdapter(set(), (random(4, 8), random(8, 4), random(4, 8), random(16, 4), 2.0,
                                       None)), (16, 8)),
        (adapters.OFTAdapter(set(), (random(4, 4, 4), None, 0.3, None)), (16, 8)),
        (adapters.BOFTAdapter(set(), (random(2, 4, 4, 4), random(16, 1), 0.3, None)), (16, 8)),
        (("diff", (random(16, 8), {"pad_weight": True})), (16, 8)),
        ((random(16, 8),), (16, 8)),
    ]  # fmt: skip
    for what, of in forms:
        assert _compare([(0.7, what, 1.0, None, None)], of) <= PER_CALL, what
    swapped = [(0.7, forms[2][0], 1.0, None, comfy.utils.swap_scale_shift)]
    assert _compare(swapped, (16, 8)) <= PER_CALL
    assert _compare([(0.0, ("set", (random(16, 8),)), 1.0, None, None)], (16, 8)) <= PER_CALL


# ---------------------------------------------------------------------- what cannot reach the ranks


@pytest.fixture
def ours(run_node, tiny_sd3) -> SimpleNamespace:
    """A MODEL on one rank that a test may patch."""
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return SimpleNamespace(ours=model.clone(), config=SD3_CONFIG, options={})


KEY = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"


def _adapter(name: str, *weights: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, weights=weights)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({KEY: ("model_as_lora", (torch.zeros(1),))}, r"kind 'model_as_lora' for .*qkv"),
        ({KEY: [(torch.zeros(1), None)]}, "a merge with another model"),
        ({KEY: _adapter("lora", torch.ones(1), torch.ones(1), 1.0, None, None, [1])}, "enlarges the weight"),
        ({KEY: _adapter("oft", torch.ones(1), None, 1.0, torch.ones(1))}, "OFT with DoRA"),
        ({KEY: _adapter("vera", torch.ones(1))}, "adapter of kind 'vera' with 1 parts"),
        ({(KEY, None, torch.abs): ("diff", (torch.ones(768, 256),))}, r"through a function \(abs\)"),
    ],
)
@pytest.mark.parametrize("node", ["KSampler", "XDiTSampler"])
def test_unknown_patches_are_refused_by_name(run_node, ours, patch, words, node):
    assert ours.ours.add_patches(patch, 1.0)

    with pytest.raises(InvalidInput, match=words):
        _sample(run_node, ours, ours.ours, node)


@pytest.mark.parametrize("node", ["KSampler", "XDiTSampler"])
def test_lora_of_another_model_is_refused(run_node, ours, node):
    ours.ours.add_patches({KEY: ("diff", (torch.zeros(7, 5),))}, 1.0)

    with pytest.raises(InvalidInput, match=r"diff patch does not fit joint_blocks.*\(768, 256\).*\(7, 5\)"):
        _sample(run_node, ours, ours.ours, node)


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoader"])
def test_a_lora_that_matches_nothing_is_warned_of_in_comfyuis_own_words(
    run_node, comfyui, ours, caplog, tiny_sd3, node
):
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    names = ("diffusion_model.no_such_block.weight", "lora_unet_single_transformer_blocks_0_proj_mlp")
    parts = {"lora_up": torch.ones(4, 2), "lora_down": torch.ones(2, 4)}
    tensors = {f"{name}.{part}.weight": t.clone() for name in names for part, t in parts.items()}
    save_file(tensors, comfyui.models / "loras" / "nothing.safetensors")
    inputs = {"lora_name": "nothing.safetensors", "strength_model": 1.0}
    inputs |= {"clip": None, "strength_clip": 1.0} if node == "LoraLoader" else {}

    def said(model: Any) -> list[str]:
        caplog.clear()
        patched, *_ = run_node(node, model=model, **inputs)
        assert not patched.patches
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    words = said(stock)
    assert words and all(any(name in sentence for sentence in words) for name in names)
    assert said(ours.ours) == words


def test_lora_per_conditioning_is_refused(run_node, ours, comfyui):
    import comfy.hooks

    tensors = loras.native(ours.ours, "lora", 1, only="joint_blocks.0.x_block.attn.qkv")
    (path := comfyui.models / "loras" / "hook.safetensors").parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    hooks = comfy.hooks.create_hook_lora(tensors, 1.0, 0.0)
    positive = conditioning_for(SD3_CONFIG, 1, hooks=hooks)

    with pytest.raises(InvalidInput, match="LoRA hooks on conditioning"):
        run_node(
            "KSampler", model=ours.ours, seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=positive, negative=positive, latent_image=empty_latent(1, 8, 8),
        )  # fmt: skip


def test_full_lora_node_without_the_text_encoders(run_node, comfyui, ours):
    if not (DEMO / "pipeline").is_dir():
        pytest.skip("no demo model")
    model, clip, _ = run_node(
        "XDiTLoadPipeline", pipeline="demo (comfy_xdit)", weight_dtype="default", parallel=layout(1)
    )
    tensors = loras.native(model, "lora", 1)
    key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{key}.lora_up.weight": torch.ones(64, 2), f"{key}.lora_down.weight": torch.ones(2, 64)}
    save_file(tensors, comfyui.models / "loras" / "both.safetensors")

    def load(strength_clip: float) -> tuple[Any, Any]:
        return run_node(
            "LoraLoader", model=model, clip=clip, lora_name="both.safetensors", strength_model=1.0,
            strength_clip=strength_clip,
        )  # fmt: skip

    patched, same = load(0.0)
    assert patched.weight_patches().name
    run_node("CLIPTextEncode", clip=same, text="a red circle")
    with pytest.raises(InvalidInput, match=r"clip_l\..*Set strength_clip of the LoRA node to 0"):
        run_node("CLIPTextEncode", clip=load(1.0)[1], text="a red circle")
