"""XDiTLoraLoader in ComfyUI: the same as the stock LoRA node, on our MODEL and on the stock one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests import tiny
from tests.comfyui import loras
from tests.comfyui.inputs import conditioning_for, empty_latent, layout, pair, random_latent, relative_l2
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3

PER_CALL, PER_RUN = 1e-5, 1e-4
SD3_CONFIG = {**tiny.SD3_CONFIG, "num_layers": 4}
STOCK, OURS = "LoraLoaderModelOnly", "XDiTLoraLoader"


@pytest.fixture
def sd3(run_node, tiny_sd3, degrees) -> SimpleNamespace:
    """The same file as stock MODEL and as ours."""
    models = pair(run_node, tiny_sd3, degrees)
    models.config, models.options = SD3_CONFIG, {}
    return models


@pytest.fixture
def flux(run_node, tiny_flux, degrees) -> SimpleNamespace:
    models = pair(run_node, tiny_flux, degrees)
    models.config, models.options = tiny.FLUX_CONFIG, {"guidance": 2.5}
    return models


@pytest.fixture
def lora(comfyui, request):
    """lora(tensors) -> the name of a file with them."""
    names: list[str] = []

    def write(tensors: dict[str, torch.Tensor]) -> str:
        name = f"{request.node.name.replace('/', '_')}_{len(names)}.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, comfyui.models / "loras" / name)
        names.append(name)
        return name

    return write


def added(run_node: Any, model: Any, *steps: tuple[str, str, float]) -> Any:
    """`model` behind these nodes: (class, file, strength), in the order of the graph."""
    for node, name, strength in steps:
        outputs = run_node(node, model=model, lora_name=name, strength_model=strength)
        (model,) = outputs["result"] if node == OURS else outputs
    return model


def sampled(run_node: Any, models: SimpleNamespace, model: Any, node: str) -> torch.Tensor:
    (latent,) = run_node(
        node, model=model, seed=7, steps=3, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=conditioning_for(models.config, 1, **models.options),
        negative=conditioning_for(models.config, 2, **models.options),
        latent_image=empty_latent(1, 10, 14),
    )  # fmt: skip
    return latent["samples"]


def called(models: SimpleNamespace, patcher: Any) -> torch.Tensor:
    """One call of the transformer of a loaded MODEL."""
    import comfy.model_management

    ((context, words),) = conditioning_for(models.config, 1, **models.options)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        extra = {k: torch.tensor([v]) for k, v in models.options.items()}
        return patcher.model.apply_model(
            random_latent(), torch.tensor([0.7]), c_crossattn=context, y=words["pooled_output"],
            transformer_options={}, **extra,
        )  # fmt: skip


def check(run_node: Any, models: SimpleNamespace, *files: tuple[str, float]) -> torch.Tensor:
    """A stack by our node, by stock nodes on our MODEL and on the stock one: one call, and a run."""
    reference = added(run_node, models.stock, *((STOCK, *file) for file in files))
    by_stock = added(run_node, models.ours, *((STOCK, *file) for file in files))
    by_ours = added(run_node, models.ours, *((OURS, *file) for file in files))
    expected = called(models, reference)
    assert relative_l2(called(models, by_ours), expected) <= PER_CALL
    assert relative_l2(called(models, by_ours), called(models, by_stock)) <= PER_CALL
    run = sampled(run_node, models, reference, "KSampler")
    for node in ("KSampler", "XDiTSampler"):
        assert relative_l2(sampled(run_node, models, by_ours, node), run) <= PER_RUN, node
    return expected


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_sd3_native_names(run_node, sd3, lora, strength):
    expected = check(run_node, sd3, (lora(loras.native(sd3.ours, "lora", 1)), strength))
    assert relative_l2(called(sd3, sd3.stock), expected) > 1e3 * PER_CALL, "it would be missed"


def test_sd3_stack_in_both_namings_and_removed(run_node, sd3, lora):
    plain = called(sd3, sd3.ours)
    native = lora(loras.native(sd3.ours, "lora", 1))
    diffusers = lora(loras.diffusers(SD3().build(SD3_CONFIG), 2))
    check(run_node, sd3, (native, 0.8), (diffusers, -0.6))
    assert not sd3.ours.patches, "the node's input stays as it was"
    assert torch.equal(called(sd3, sd3.ours), plain)


def test_flux_in_both_namings(run_node, flux, lora):
    native = lora(loras.native(flux.ours, "lora", 1))
    module = tiny.build(Flux(), tiny.FLUX_CONFIG)
    expected = check(run_node, flux, (native, 0.8), (lora(loras.diffusers(module, 2)), -0.6))
    assert relative_l2(called(flux, flux.stock), expected) > 1e3 * PER_CALL


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set"])
def test_kinds(run_node, sd3, lora, kind):
    # Rows of every layer divide by 4 and 8, as OFT's and BOFT's blocks need, in the blocks only.
    name = lora(loras.native(sd3.ours, kind, 3, only="joint_blocks"))
    by_ours = added(run_node, sd3.ours, (OURS, name, 0.7))
    expected = called(sd3, added(run_node, sd3.stock, (STOCK, name, 0.7)))
    assert relative_l2(called(sd3, by_ours), expected) <= PER_CALL
    assert relative_l2(called(sd3, sd3.stock), expected) > 50 * PER_CALL


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_mixed_with_stock_nodes_in_the_order_of_the_graph(run_node, sd3, lora, order):
    """A whole weight put in place undoes what came before it, whichever node it came from."""
    only = "joint_blocks.0.x_block"
    files = [
        (lora(loras.native(sd3.ours, "lora", 1, only=only)), 1.0),
        (lora(loras.native(sd3.ours, "set", 2, only=only)), 1.0),
        (lora(loras.native(sd3.ours, "lora", 3, only=only)), -0.5),
    ]
    stack = [files[i] for i in order]
    expected = called(sd3, added(run_node, sd3.stock, *((STOCK, *file) for file in stack)))
    for nodes in ((OURS, STOCK, OURS), (STOCK, OURS, STOCK)):
        steps = [(node, *file) for node, file in zip(nodes, stack, strict=True)]
        assert relative_l2(called(sd3, added(run_node, sd3.ours, *steps)), expected) <= PER_CALL, nodes


# ---------------------------------------------------------------------- on one rank


@pytest.fixture
def ours(run_node, tiny_sd3) -> Any:
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )
    return model


def test_the_node_says_what_it_left_out(run_node, ours, lora):
    tensors = loras.native(ours, "lora", 1, only="joint_blocks.0.x_block.attn.qkv")
    name = lora(tensors | {"elsewhere.lora_up.weight": torch.ones(2, 2)})
    outputs = run_node(OURS, model=ours, lora_name=name, strength_model=1.0)
    assert outputs["ui"]["text"] == [
        f"{name} changes 1 weight. Left out, since they match nothing: 1 tensor (elsewhere.lora_up.weight)."
    ]


def test_strength_0_gives_the_same_model(run_node, ours, lora):
    name = lora(loras.native(ours, "lora", 1))
    assert added(run_node, ours, (OURS, name, 0.0)) is ours


def test_what_is_wrong_is_an_error_of_the_node(run_node, comfyui, ours, tiny_sd3, lora):
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    name = lora({"elsewhere": torch.ones(1)})
    with pytest.raises(InvalidInput, match="this one is a stock MODEL"):
        run_node(OURS, model=stock, lora_name=name, strength_model=1.0)
    with pytest.raises(InvalidInput, match=r"none of the 1 tensors of .* match this sd3"):
        run_node(OURS, model=ours, lora_name=name, strength_model=1.0)
    (comfyui.models / "loras" / "pickle.pt").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidInput, match="pickle file, which can run code"):
        run_node(OURS, model=ours, lora_name="pickle.pt", strength_model=1.0)
    with pytest.raises(InvalidInput, match=r"no LoRA .gone\.safetensors"):
        run_node(OURS, model=ours, lora_name="gone.safetensors", strength_model=1.0)


def test_another_file_under_the_same_name_is_another_run(comfyui, ours, lora):
    node, tensors = comfyui.mappings[OURS], loras.native(ours, "lora", 1)
    name = lora(tensors)
    before = node.IS_CHANGED(model=None, lora_name=name, strength_model=1.0)
    assert node.IS_CHANGED(model=None, lora_name=name, strength_model=1.0) == before
    lora_file = comfyui.models / "loras" / name
    save_file({**tensors, "more": torch.ones(3)}, lora_file)
    assert node.IS_CHANGED(model=None, lora_name=name, strength_model=1.0) != before
