"""A model file that is written over while ComfyUI's own class has it in the ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui import loras
from tests.comfyui.inputs import layout, one_step
from tests.comfyui.test_comfyui_formats import FORMATS, call, load_ours, made


@pytest.fixture(autouse=True)
def forced(comfyui, monkeypatch):
    from comfy_xdit.comfy_types.choice import FORCED

    monkeypatch.setenv(FORCED, "comfyui")


def test_what_is_loaded_stays_and_a_lora_is_not_put_on_other_weights(comfyui, run_node, tiny_sd3):
    file = comfyui.models / "diffusion_models" / "written_over.safetensors"
    shutil.copy(comfyui.models / "diffusion_models" / tiny_sd3, file)
    inputs = {"unet_name": file.name, "weight_dtype": "default", "parallel": layout(1)}
    (model,) = run_node("XDiTLoadDiffusionModel", **inputs)
    save_file(loras.native(model, "lora", 1), comfyui.models / "loras" / "late.safetensors")
    (patched,) = run_node(
        "LoraLoaderModelOnly", model=model, lora_name="late.safetensors", strength_model=1.0
    )
    before = one_step(run_node, model)

    write_over(file)

    assert (one_step(run_node, model) == before).all()
    with pytest.raises(InvalidInput, match=r"written_over\.safetensors was changed"):
        one_step(run_node, patched)


@pytest.mark.parametrize("form", FORMATS)
def test_layers_in_formats_of_their_own_stay_as_they_were(comfyui, run_node, form):
    """They take tensors as the file has them, which on a CPU were views of it."""
    folder = comfyui.models / "diffusion_models"
    name = made(form, folder, words="_written_over")
    model = load_ours(run_node, name)
    before = call(model)

    write_over(folder / name)

    assert torch.equal(call(model), before)


def write_over(file: Path) -> None:
    """As `cp` does: into the same file, whose size and header stay."""
    content = bytearray(file.read_bytes())
    behind = 8 + int.from_bytes(content[:8], "little")
    content[behind:] = bytes(len(content) - behind)
    with file.open("r+b") as opened:
        opened.write(content)
