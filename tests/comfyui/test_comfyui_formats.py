"""Quantised files in the ranks, in ComfyUI's own classes: bit-equal to stock, and as small."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Status
from comfy_xdit.ranks.registry import worker_group
from tests.comfyui.inputs import METHODS, layout, relative_l2
from tests.comfyui.tiny_classes import write
from worker.models.comfyui.cases import CASES, Draw

pytestmark = pytest.mark.usefixtures("threads_of_a_rank")

NAME = "wan t2v"
CHANGED = "blocks.0.ffn.2"  # by a LoRA
Tensors = dict[str, torch.Tensor]
File = tuple[Tensors, dict[str, str]]  # and the metadata
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def linears(tensors: Tensors) -> list[str]:
    return [k for k, t in tensors.items() if k.startswith("blocks") and k.endswith(".weight") and t.ndim == 2]


def plain(tensors: Tensors, dtype: torch.dtype) -> File:
    """Every weight stored in fp8, without scales."""
    return {k: t.to(dtype) if t.ndim > 1 and k.startswith("blocks") else t for k, t in tensors.items()}, {}


def scaled(tensors: Tensors, dtype: torch.dtype, inputs: bool = False) -> File:
    """The format of ComfyUI's repackaged files: a marker, and scales per layer.

    E5M2 has room above 448: what a LoRA makes larger is infinity otherwise, in stock too.
    """
    given = {"scaled_fp8": torch.zeros(0 if inputs else 2, dtype=dtype), **tensors}
    for key in linears(tensors):
        layer = key.removesuffix("weight")
        scale = tensors[key].abs().max() / 448
        given |= {key: (tensors[key] / scale).to(dtype), f"{layer}scale_weight": scale.float()}
        if inputs:
            given[f"{layer}scale_input"] = torch.tensor(0.02)
    return given, {}


def partly_scaled(tensors: Tensors) -> File:
    """The same, but for a layer whose weight needs no scale, and has none: the one that the LoRA changes."""
    given, told = scaled(tensors, E4M3)
    given[f"{CHANGED}.weight"] = tensors[f"{CHANGED}.weight"].to(E4M3)
    del given[f"{CHANGED}.scale_weight"]
    return given, told


def mixed(tensors: Tensors, kind: str, said: bool) -> File:
    """The newer formats, each layer by itself: named in the metadata, or in a tensor of the layer's own.

    Skips where this ComfyUI does not know the format.
    """
    quant_ops = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI knows scaled fp8 alone")
    if kind not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {kind}")
    given, layers = dict(tensors), {}
    for key in linears(tensors):
        layer, layout = key.removesuffix(".weight"), quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
        scale = {"scale": "recalculate"} if kind.startswith("float8") else {}
        quantised = quant_ops.QuantizedTensor.from_float(tensors[key], layout, **scale)
        given |= {name: t.clone() for name, t in quantised.state_dict(key).items()}
        layers[layer] = {"format": kind}
        if not said:
            words = list(json.dumps(layers[layer]).encode())
            given[f"{layer}.comfy_quant"] = torch.tensor(words, dtype=torch.uint8)
    told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return given, told if said else {}


FORMATS = {
    "plain e4m3": lambda tensors: plain(tensors, E4M3),
    "plain e5m2": lambda tensors: plain(tensors, E5M2),
    "scaled e4m3": lambda tensors: scaled(tensors, E4M3),
    "scaled e5m2": lambda tensors: scaled(tensors, E5M2),
    "scaled, inputs too": lambda tensors: scaled(tensors, E4M3, inputs=True),
    "scaled, but for one": partly_scaled,
    "mixed e4m3, in metadata": lambda tensors: mixed(tensors, "float8_e4m3fn", said=True),
    "mixed e4m3": lambda tensors: mixed(tensors, "float8_e4m3fn", said=False),
    "mixed e5m2": lambda tensors: mixed(tensors, "float8_e5m2", said=False),
    "mixed nvfp4": lambda tensors: mixed(tensors, "nvfp4", said=False),
    "mixed mxfp8": lambda tensors: mixed(tensors, "mxfp8", said=False),
    "mixed int8": lambda tensors: mixed(tensors, "int8_tensorwise", said=False),
}


def made(kind: str, folder: Path, words: str = "", **sizes: Any) -> str:
    """A tiny file in a format, if this ComfyUI reads that; its name for the loaders."""
    tensors, metadata = FORMATS[kind](load_file(folder / write(NAME, folder, **sizes)))
    name = f"wan_{kind.replace(', ', '_').replace(' ', '_')}{words}.safetensors"
    save_file(tensors, folder / name, metadata)
    return name


@pytest.fixture(params=FORMATS)
def file(request, comfyui) -> str:
    """One in each format."""
    return made(request.param, comfyui.models / "diffusion_models")


def load(run_node, name: str, **degrees: Any) -> tuple[Any, Any]:
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout(**degrees)
    )
    return stock, ours


def load_ours(run_node, name: str) -> Any:
    return run_node("XDiTLoadDiffusionModel", unet_name=name, weight_dtype="default", parallel=layout())[0]


def call(model: Any, batch: int = 1) -> torch.Tensor:
    args, kwargs = CASES[NAME].call(Draw(batch))
    with torch.inference_mode():
        return model.model.diffusion_model(*args, **kwargs, transformer_options={})


def test_one_rank_is_bit_equal_to_stock(run_node, file):
    stock, ours = load(run_node, file)

    assert torch.equal(call(ours), call(stock))


# Of module scope, so that the tests of one layout run together: another layout is other processes.
@pytest.fixture(params=METHODS, scope="module")
def method(request) -> dict[str, Any]:
    """Each of them, as degrees."""
    return METHODS[request.param]


def test_every_method_equals_stock(comfyui, run_node, file, method):
    stock, ours = load(run_node, file, **method)
    wanted = call(stock, 2)

    most = quantisers_own(comfyui, run_node, wanted) if "int8" in file else 1e-5
    assert relative_l2(call(ours, 2), wanted) <= most


def quantisers_own(comfyui, run_node, quantised: torch.Tensor) -> float:
    """How far the format itself is off the model: of one that rounds a layer's inputs to few steps.

    Sums in another order, 1e-7 off, are rounded to another step here and there.
    """
    name = write(NAME, comfyui.models / "diffusion_models")
    (exact,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    return relative_l2(quantised, call(exact, 2))


def test_two_stages_equal_stock(run_node, file):
    """A whole run of which every step is warm-up; each stage holds its blocks in the file's format."""
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


@pytest.mark.parametrize("degrees", [{}, METHODS["sharded"]], ids=["one", "sharded"])
def test_a_lora_is_rounded_as_stock_rounds_it(comfyui, run_node, file, degrees):
    """Converted from the layer's format, patched and converted back, with ComfyUI's own random numbers."""
    stock, ours = load(run_node, file, **degrees)
    generator = torch.Generator().manual_seed(5)
    save_file(
        {
            f"diffusion_model.{CHANGED}.lora_up.weight": torch.randn(48, 4, generator=generator),
            f"diffusion_model.{CHANGED}.lora_down.weight": torch.randn(4, 96, generator=generator),
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


@pytest.mark.parametrize("kind", FORMATS)
def test_sharded_a_rank_holds_its_part(comfyui, run_node, kind):
    """Half of the blocks' bytes in their format, and twice the largest block besides."""
    folder, layers = comfyui.models / "diffusion_models", 8
    file = made(kind, folder, "_deep", num_layers=layers, dim=256, ffn_dim=512)
    call(load_ours(run_node, file))
    whole = held(file)
    _, ours = load(run_node, file, **METHODS["sharded"])
    call(ours)
    stored = {name: t for name, t in load_file(folder / file).items() if name.startswith("blocks")}
    blocks = [0] * layers
    for name, tensor in stored.items():
        plain = kind == "scaled, but for one" and name == f"{CHANGED}.weight"  # as fp32, which is computed in
        blocks[int(name.split(".")[1])] += tensor.numel() * 4 if plain else tensor.nbytes

    spared = (1 - 1 / 2) * sum(blocks) - 2 * max(blocks) - 256 * len(stored)  # each at a multiple of 256
    assert 0 < spared <= whole - held(file, **METHODS["sharded"])


def held(name: str, **degrees: Any) -> int:
    models = worker_group(layout(**degrees)).call(Status()).value["models"]
    (told,) = [model["bytes"] for model in models if model["name"] == name]
    return told


def saved(comfyui: Any, file: str, change: Callable[[Tensors, dict[str, str]], File]) -> str:
    """A mixed-precision file with a change; its name for the loaders."""
    folder = comfyui.models / "diffusion_models"
    tensors, metadata = change(*FORMATS["plain e4m3"](load_file(folder / write(NAME, folder))))
    with torch.inference_mode(False):
        save_file(tensors, folder / file, metadata)
    return file


def told(words: bytes) -> Callable[[Tensors, dict[str, str]], File]:
    tensor = torch.tensor(list(words), dtype=torch.uint8)
    return lambda tensors, _: (tensors | {"blocks.0.ffn.0.comfy_quant": tensor}, {})


BAD = {
    "a format of no version": (told(b'{"format": "int3"}'), "holds layers as 'int3'"),
    "a format in no JSON": (told(b"int3"), "what this ComfyUI does not understand"),
    "a format in a list": (told(b"[1]"), "what this ComfyUI does not understand"),
    "no format": (told(b"{}"), "what this ComfyUI does not understand"),
    "metadata in no JSON": (
        lambda tensors, _: (tensors, {"_quantization_metadata": "{"}),
        "what this ComfyUI does not understand",
    ),
    "no scales": (told(b'{"format": "nvfp4"}'), "does not fit ComfyUI's WanModel"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_description_is_refused_soon_and_leaves_what_is_loaded(comfyui, run_node, kind):
    import comfy.utils

    change, words = BAD[kind]
    (good,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=write(NAME, comfyui.models / "diffusion_models"),
        weight_dtype="default", parallel=layout(),
    )  # fmt: skip
    before, bad = call(good), saved(comfyui, "bad.safetensors", change)
    if not hasattr(comfy.utils, "convert_old_quants"):
        words = "loads without their scales; update ComfyUI"

    began = time.perf_counter()
    with pytest.raises(InvalidInput, match=words):
        load_ours(run_node, bad)

    assert time.perf_counter() - began < 2
    assert torch.equal(call(good), before)


FOREIGN = {
    "nunchaku": ("blocks.0.ffn.0.wscales", "nunchaku"),
    "bitsandbytes nf4": ("blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    "bitsandbytes fp4": ("blocks.0.ffn.0.weight.quant_state.bitsandbytes__fp4", "bitsandbytes"),
    "GPTQ": ("blocks.0.ffn.0.qzeros", "GPTQ"),
    "quanto": ("blocks.0.ffn.0.weight._data", "optimum-quanto"),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_a_format_of_another_program_is_refused_by_its_name(comfyui, run_node, program):
    name, words = FOREIGN[program]
    bad = saved(comfyui, "foreign.safetensors", lambda tensors, _: (tensors | {name: torch.zeros(4)}, {}))

    with pytest.raises(InvalidInput, match=f"quantised by {words}.*choose a file of the model in GGUF"):
        load_ours(run_node, bad)
