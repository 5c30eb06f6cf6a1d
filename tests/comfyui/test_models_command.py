"""`comfy-xdit models FILE --comfyui FOLDER`: files of ComfyUI's classes, GGUF among them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit import cli
from comfy_xdit.protocol import remembered
from tests.comfyui.tiny_classes import write


@pytest.fixture
def tell(comfyui, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))

    def lines(path: Path) -> list[str]:
        assert cli.main(["models", str(path), "--comfyui", os.environ["COMFYUI_DIR"]]) == cli.DONE
        return capsys.readouterr().out.splitlines()

    return lines


def of_comfyui(lines: list[str]) -> dict[str, str]:
    """What is said of ComfyUI's class, and of each method."""
    at = next(i for i, line in enumerate(lines) if line.startswith("class of ComfyUI"))
    return {"class": lines[at]} | {line[2:20].strip(): line[20:] for line in lines[at + 1 : at + 7]}


def test_a_class_of_comfyui(comfyui, tell):
    folder = comfyui.models / "diffusion_models"
    lines = tell(folder / write("wan t2v", folder))

    told = of_comfyui(lines)
    assert ": WanModel, " in told["class"]
    assert told["CFG parallel"] == told["data parallel"] == told["sharded weights"] == "yes"
    assert told["PipeFusion"] == "yes"
    assert told["Ulysses"].startswith("yes, as far as is known: it is not proven yet")
    assert any(line.startswith("diffusers' class: no: ") for line in lines)


def test_why_a_method_cannot_be_used(comfyui, tell):
    folder = comfyui.models / "diffusion_models"
    told = of_comfyui(tell(folder / write("lumina 2", folder)))
    assert told["PipeFusion"].startswith("no: pipefusion_degree 2 cannot spread lumina_2.safetensors")


def test_a_gguf_file(comfyui, tell):
    gguf_files = pytest.importorskip("tests.gguf_files")
    folder = comfyui.models / "diffusion_models"
    with torch.inference_mode(False):
        source = load_file(folder / write("wan t2v", folder))
        gguf_files.write(folder / "told.gguf", source, gguf_files.packed_as("Q4_0"))

    lines = tell(folder / "told.gguf")

    assert lines[2] == "quantisation: GGUF, packed as Q4_0"
    assert ": WanModel, " in of_comfyui(lines)["class"]
    assert any("diffusers' class: no: told.gguf is a GGUF file" in line for line in lines)


def test_an_unknown_file_is_near_a_class_of_comfyui(comfyui, tell, tmp_path):
    folder = comfyui.models / "diffusion_models"
    tensors = load_file(folder / write("wan t2v", folder))
    tensors = {name.replace("head.modulation", "tail.modulation"): t for name, t in tensors.items()
               if "tiny_size" not in name}  # fmt: skip
    with torch.inference_mode(False):
        save_file(tensors, tmp_path / "unknown.safetensors")

    lines = tell(tmp_path / "unknown.safetensors")

    assert any(line.startswith("class of ComfyUI") and "does not recognise" in line for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("near "))
    assert lines[at].startswith("near ComfyUI's WanModel (wan t2v)")
    assert lines[at + 1] == "  in the file alone: tail.modulation"
    assert lines[at + 2] == "  in the family alone: head.modulation"
