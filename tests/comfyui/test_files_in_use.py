"""A model file that is written over while ComfyUI's own class has it in the ranks."""

import shutil

import pytest
from safetensors.torch import save_file

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui import loras
from tests.comfyui.inputs import layout, one_step


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

    content = bytearray(file.read_bytes())
    behind = len(content) // 10  # the header
    content[behind:] = bytes(len(content) - behind)
    with file.open("r+b") as opened:  # as `cp` does: into the same file
        opened.write(content)

    assert (one_step(run_node, model) == before).all()
    with pytest.raises(InvalidInput, match=r"written_over\.safetensors was changed"):
        one_step(run_node, patched)
