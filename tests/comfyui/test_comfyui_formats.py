"""Quantised files in the ranks, in ComfyUI's own classes: bit-equal to stock, and as small."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.environment import rank_threads
from tests.comfyui.inputs import layout, relative_l2
from tests.comfyui.tiny_classes import write
from worker.models.comfyui.cases import CASES, Draw

NAME = "wan t2v"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def threads():
    """As many as a rank has: sums are in another order with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(rank_threads(1))
    yield
    torch.set_num_threads(before)


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [k for k, t in tensors.items() if k.startswith("blocks") and k.endswith(".weight") and t.ndim == 2]


def plain(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every weight stored in fp8, without scales."""
    return {k: t.to(FP8) if t.ndim > 1 and k.startswith("blocks") else t for k, t in tensors.items()}, {}


def scaled(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The format of ComfyUI's repackaged files: a marker, and a scale per layer."""
    given = {"scaled_fp8": torch.zeros(2, dtype=FP8), **tensors}
    for key in linears(tensors):
        scale = tensors[key].abs().max() / 448
        given[key] = (tensors[key] / scale).to(FP8)
        given[key.removesuffix("weight") + "scale_weight"] = scale.float()
    return given, {}


def mixed(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The newer format: layers named in the metadata."""
    given, layers = dict(tensors), {}
    for key in linears(tensors):
        scale = tensors[key].abs().max() / 448
        given[key] = (tensors[key] / scale).to(FP8)
        given[key.removesuffix("weight") + "weight_scale"] = scale.float()
        layers[key.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    return given, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


FORMATS = {"plain": plain, "scaled": scaled, "mixed": mixed}


@pytest.fixture(params=FORMATS)
def file(request, comfyui) -> str:
    """A tiny file in each format; its name for the loaders."""
    folder = comfyui.models / "diffusion_models"
    source = write(NAME, folder)
    tensors, metadata = FORMATS[request.param](load_file(folder / source))
    name = f"wan_{request.param}.safetensors"
    save_file(tensors, folder / name, metadata)
    return name


def load(run_node, name: str, **degrees: Any) -> tuple[Any, Any]:
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout(**degrees)
    )
    return stock, ours


def call(model: Any, batch: int = 1) -> torch.Tensor:
    args, kwargs = CASES[NAME].call(Draw(batch))
    with torch.inference_mode():
        return model.model.diffusion_model(*args, **kwargs, transformer_options={})


def reads(file: str) -> bool:
    """Whether this ComfyUI reads the format."""
    import comfy.utils

    return "mixed" not in file or hasattr(comfy.utils, "convert_old_quants")


def test_one_rank_is_bit_equal_to_stock(run_node, file):
    if not reads(file):
        with pytest.raises(InvalidInput, match="loads without their scales; update ComfyUI"):
            load(run_node, file)
        return
    stock, ours = load(run_node, file)

    assert torch.equal(call(ours), call(stock))


@pytest.mark.parametrize("degrees", [{"cfg_parallel_degree": 2}, {"ulysses_degree": 2}], ids=str)
def test_two_ranks_equal_stock(run_node, file, degrees):
    if not reads(file):
        pytest.skip("this ComfyUI does not read the format")
    stock, ours = load(run_node, file, **degrees)

    assert relative_l2(call(ours, 2), call(stock, 2)) <= 1e-5


def test_two_stages_equal_stock(run_node, file):
    """A whole run of which every step is warm-up; each stage holds its blocks in the file's format."""
    if not reads(file):
        pytest.skip("this ComfyUI does not read the format")
    stock, ours = load(run_node, file, pipefusion_degree=2, warmup_steps=99)
    generator = torch.Generator().manual_seed(1)
    prompts = [[[torch.randn(1, tokens, 40, generator=generator), {}]] for tokens in (11, 7)]

    latents = []
    for model, node in ((ours, "XDiTSampler"), (stock, "KSampler")):
        (latent,) = run_node(
            node, model=model, seed=7, steps=2, cfg=3.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=prompts[0], negative=prompts[1],
            latent_image={"samples": torch.zeros(1, 16, 3, 10, 14)},
        )  # fmt: skip
        latents.append(latent["samples"])

    assert relative_l2(*latents) <= 1e-5


def test_a_lora_is_rounded_as_stock_rounds_it(comfyui, run_node, file):
    """Converted from the layer's format, patched and converted back, with ComfyUI's own random numbers."""
    if not reads(file):
        pytest.skip("this ComfyUI does not read the format")
    stock, ours = load(run_node, file)
    generator = torch.Generator().manual_seed(5)
    module = "blocks.0.ffn.2"
    save_file(
        {
            f"diffusion_model.{module}.lora_up.weight": torch.randn(48, 4, generator=generator),
            f"diffusion_model.{module}.lora_down.weight": torch.randn(4, 96, generator=generator),
        },
        comfyui.models / "loras" / "formats_lora.safetensors",
    )
    before, outputs = call(ours), []
    for model in (ours, stock):
        (patched,) = run_node(
            "LoraLoaderModelOnly", model=model, lora_name="formats_lora.safetensors", strength_model=0.5
        )
        patched.patch_model()
        patched.pre_run()
        outputs.append(call(patched))
        patched.unpatch_model()

    assert relative_l2(*outputs) <= 1e-5
    assert relative_l2(outputs[0], before) > 1e-3
    ours.pre_run()
    assert torch.equal(call(ours), before), "and off again"


def test_quantised_weights_are_not_spread(run_node, file):
    if "plain" in file or not reads(file):
        pytest.skip("plain fp8 is a dtype like any other")
    with pytest.raises(InvalidInput, match="quantised weights, which cannot be spread"):
        load(run_node, file, data_parallel_degree=2, shard_weights=True)
