"""GGUF files in ComfyUI's classes in the ranks: the unpacked model's numbers, a packed one's memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.gguf_header import read_header
from comfy_xdit.protocol.messages import Status
from comfy_xdit.ranks.registry import worker_group
from tests import gguf_files
from tests.comfyui.inputs import METHODS, layout, relative_l2
from tests.comfyui.tiny_classes import write
from worker.models.comfyui.cases import CASES, Draw

pytestmark = pytest.mark.usefixtures("threads_of_a_rank")

NAME = "wan t2v"
WIDE = {"dim": 256, "ffn_dim": 512}  # rows of whole blocks of every type
# Of other classes, whose names, and kinds of layers, are others.
OTHERS = ("flux", "flux2", "qwen image", "lumina 2", "hunyuan video", "sd3.5 medium", "ltxv", "auraflow")
CONVERTED: dict[tuple[str, str], tuple[str, str]] = {}


def files(folder: Path, kind: str, name: str = NAME, **sizes: Any) -> tuple[str, str]:
    """A GGUF file of a case, and one of its unpacked weights in fp32; their names for the loaders."""
    if (name, kind) not in CONVERTED:
        source = write(name, folder, **sizes)
        words = f"{Path(source).stem}_{kind}"
        with torch.inference_mode(False):
            tensors = gguf_files.write(
                folder / f"{words}.gguf", load_file(folder / source), gguf_files.packed_as(kind)
            )
            save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{words}.safetensors")
        CONVERTED[name, kind] = f"{words}.gguf", f"{words}.safetensors"
    return CONVERTED[name, kind]


@pytest.fixture
def wan(comfyui) -> tuple[str, str]:
    return files(comfyui.models / "diffusion_models", "Q4_K", **WIDE)


def load(run_node: Any, name: str, dtype: str = "default", **degrees: Any) -> Any:
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=name, weight_dtype=dtype, parallel=layout(**degrees)
    )
    return model


def stock(run_node: Any, name: str) -> Any:
    return run_node("UNETLoader", unet_name=name, weight_dtype="default")[0]


def call(model: Any, batch: int = 1, name: str = NAME) -> torch.Tensor:
    args, kwargs = CASES[name].call(Draw(batch))
    with torch.inference_mode():
        return model.model.diffusion_model(*args, **kwargs, transformer_options={})


def test_the_loader_lists_them(comfyui, wan):
    """Beside what ComfyUI itself reads; its own loader's list is as it was."""
    names = comfyui.mappings["XDiTLoadDiffusionModel"].INPUT_TYPES()["required"]["unet_name"][0]
    assert set(wan) <= set(names)
    assert wan[0] not in comfyui.mappings["UNETLoader"].INPUT_TYPES()["required"]["unet_name"][0]


@pytest.mark.parametrize("kind", [*gguf_files.PACKED, "BF16", "F16"])
def test_every_type_is_the_unpacked_model(comfyui, run_node, kind):
    packed, unpacked = files(comfyui.models / "diffusion_models", kind, **WIDE)

    assert torch.equal(call(load(run_node, packed)), call(stock(run_node, unpacked)))


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_too(comfyui, run_node, name):
    packed, unpacked = files(comfyui.models / "diffusion_models", "Q4_0", name)

    assert (
        relative_l2(call(load(run_node, packed), 2, name), call(stock(run_node, unpacked), 2, name)) <= 1e-6
    )


@pytest.mark.parametrize("degrees", METHODS.values(), ids=METHODS.keys())
def test_every_method_is_the_unpacked_model(run_node, wan, degrees):
    packed, unpacked = wan

    assert relative_l2(call(load(run_node, packed, **degrees), 2), call(stock(run_node, unpacked), 2)) <= 1e-5


def test_two_stages_are_the_unpacked_model(run_node, wan):
    """A whole run of which every step is warm-up."""
    packed, unpacked = wan
    ours = load(run_node, packed, pipefusion_degree=2, warmup_steps=99)
    generator = torch.Generator().manual_seed(1)
    prompts = [[[torch.randn(1, tokens, 40, generator=generator), {}]] for tokens in (11, 7)]

    latents = []
    for model, node in ((ours, "XDiTSampler"), (stock(run_node, unpacked), "KSampler")):
        (latent,) = run_node(
            node, model=model, seed=7, steps=2, cfg=3.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=prompts[0], negative=prompts[1],
            latent_image={"samples": torch.zeros(1, 16, 3, 10, 14)},
        )  # fmt: skip
        latents.append(latent["samples"])

    assert relative_l2(*latents) <= 1e-5


def test_weights_are_rounded_to_the_dtype_that_is_asked_for(run_node, wan):
    packed, unpacked = (load(run_node, name, "bf16") for name in wan)

    assert torch.equal(call(packed), call(unpacked))
    assert not torch.equal(call(packed), call(load(run_node, wan[0])))


@pytest.mark.parametrize("method", ["none", "ulysses", "sharded"])
def test_a_lora_is_added_to_the_unpacked_weights(comfyui, run_node, wan, method):
    generator, change = torch.Generator().manual_seed(5), {}
    for module, out, width in (("blocks.0.ffn.2", 256, 512), ("blocks.1.self_attn.q", 256, 256)):
        change[f"diffusion_model.{module}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.1
        change[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    save_file(change, comfyui.models / "loras" / "gguf_lora.safetensors")
    ours, theirs = load(run_node, wan[0], **METHODS.get(method, {})), stock(run_node, wan[1])
    before, outputs = call(ours), []
    for model in (ours, theirs):
        (patched,) = run_node(
            "LoraLoaderModelOnly", model=model, lora_name="gguf_lora.safetensors", strength_model=0.5
        )
        patched.patch_model()
        patched.pre_run()
        outputs.append(call(patched))
        patched.unpatch_model()

    assert relative_l2(*outputs) <= 1e-5
    assert relative_l2(outputs[0], before) > 1e-3
    ours.pre_run()
    assert torch.equal(call(ours), before), "and off again"


@pytest.mark.parametrize("degrees", [{}, METHODS["cfg"]], ids=["one", "two"])
def test_they_take_a_packed_model_s_memory(comfyui, run_node, wan, degrees):
    """Blocks as they are in the file, and the other weights in the dtype they are computed in."""
    ours = load(run_node, wan[0], **degrees)
    call(ours)
    stored = read_header(comfyui.models / "diffusion_models" / wan[0]).tensors.values()
    wanted = sum(t.stop - t.start if t.dtype == "Q4_K" else 4 * torch.Size(t.shape).numel() for t in stored)

    group = worker_group(layout(**degrees))
    for rank in range(layout(**degrees).world_size):
        models = group.call(Status(), ranks=(rank,)).value["models"]
        assert [told["bytes"] for told in models if told["name"] == wan[0]] == [wanted]


def test_sharded_they_take_a_part_of_it(run_node, wan):
    whole, degrees = {}, METHODS["sharded"]
    for name in wan:
        call(load(run_node, name, **degrees))
        models = worker_group(layout(**degrees)).call(Status()).value["models"]
        (whole[name],) = [told["bytes"] for told in models if told["name"] == name]

    assert whole[wan[0]] < 0.5 * whole[wan[1]]


def _cut(file: Path) -> bytes:
    return file.read_bytes()[:-1000]


def _of(tensors: dict[str, torch.Tensor], kind: str = "Q8_0", architecture: str = "llama"):
    def make(file: Path) -> bytes:
        gguf_files.write(file, tensors, gguf_files.packed_as(kind), architecture)
        return file.read_bytes()

    return make


BAD = {
    "cut off": (_cut, "after the end of the file: it is incomplete"),
    "cut in its header": (lambda file: file.read_bytes()[:500], "header is longer than the file"),
    "empty": (lambda _: b"", "does not begin with GGUF"),
    "no GGUF": (lambda _: b"\x80" * 4096, "does not begin with GGUF"),
    "a language model": (
        _of({"token_embd.weight": torch.zeros(64, 64)}), "does not recognise .* .architecture 'llama'."
    ),
    "a type that cannot be unpacked": (
        lambda file: _of({"a.weight": torch.zeros(4, 256)}, "IQ4_XS")(file).replace(
            (23).to_bytes(4, "little"), (18).to_bytes(4, "little")
        ),
        "IQ3_XXS, which cannot be unpacked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_soon_and_leaves_what_is_loaded(comfyui, run_node, wan, kind):
    make, words = BAD[kind]
    ours = load(run_node, wan[0])
    before, folder = call(ours), comfyui.models / "diffusion_models"
    bad = folder / "bad.gguf"
    with torch.inference_mode(False):
        bad.write_bytes((folder / wan[0]).read_bytes())
        bad.write_bytes(make(bad))
    starts = worker_group(layout(1)).start_seconds

    began = time.perf_counter()
    with pytest.raises(InvalidInput, match=words):
        load(run_node, bad.name)

    assert time.perf_counter() - began < 2
    assert torch.equal(call(ours), before)
    assert worker_group(layout(1)).start_seconds == starts


def test_a_file_that_lacks_a_tensor_is_refused(comfyui, run_node, wan):
    folder = comfyui.models / "diffusion_models"
    tensors = load_file(folder / wan[1])
    del tensors["blocks.1.ffn.0.weight"]
    with torch.inference_mode(False):
        gguf_files.write(folder / "lacking.gguf", tensors, gguf_files.packed_as("Q8_0"))

    for degrees in ({}, METHODS["sharded"]):
        with pytest.raises(InvalidInput, match=r"lacks the tensor blocks\.1\.ffn\.0\.weight"):
            load(run_node, "lacking.gguf", **degrees)


def test_a_controlnet_takes_over_unpacked_embedders(comfyui, tiny_sd3):
    """One for SD3.5 copies them from the model's file before each run."""
    from comfy_xdit.comfy_types.model.twin import build_twin

    folder = comfyui.models / "diffusion_models"
    with torch.inference_mode(False):
        numbers = gguf_files.write(
            folder / "sd3.gguf", load_file(folder / tiny_sd3), gguf_files.packed_as("Q8_0"), "sd3"
        )
    names = {name.split("diffusion_model.")[-1]: name for name in numbers}

    twin = build_twin(folder / "sd3.gguf", torch.float32)

    for embedder in ("x_embedder", "y_embedder"):
        for name, tensor in getattr(twin.diffusion_model, embedder).state_dict().items():
            assert torch.equal(tensor.float(), numbers[names[f"{embedder}.{name}"]]), name


def test_fp8_is_no_dtype_for_packed_weights(run_node, wan):
    with pytest.raises(InvalidInput, match="whose weights are packed; set weight_dtype to default"):
        load(run_node, wan[0], "fp8_e4m3fn")
