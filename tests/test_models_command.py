"""`comfy-xdit models FILE` without ComfyUI: what a file is, its methods, and what an unknown one is near."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit import cli
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.model_files import quantisation, stored_tensors
from comfy_xdit.ranks.environment import ROOT
from worker.models import FAMILIES, near

PIPELINE = ROOT / "assets" / "demo" / "pipeline"
METHODS = ("CFG parallel", "data parallel", "Ulysses", "Ring", "PipeFusion", "sharded weights")


def told(capsys, path: Path) -> list[str]:
    assert cli.main(["models", str(path)]) == cli.DONE
    return capsys.readouterr().out.splitlines()


def test_a_known_file(capsys, tiny_models):
    file = tiny_models["sd3"].file
    numbers = sum(t.numel() for t in load_file(file).values())

    head, counts, format_, family, *methods, hint = told(capsys, file)

    assert head.startswith(f"{file}: ") and f"{len(load_file(file))} tensors" in head
    assert counts == f"numbers: {numbers / 1e9:.3g} billion (F32 100.0%)"
    assert format_ == "quantisation: none"
    assert family.startswith("diffusers' class: sd3, ") and "float32" in family
    assert [line.split("  ")[1] for line in methods] == list(METHODS)
    assert all(line.endswith(" yes") for line in methods)
    assert "--comfyui FOLDER" in hint


def test_what_a_method_is_refused_for_is_said(capsys, tiny_models):
    """FLUX.1's guidance is distilled: a second prompt is of no use to it."""
    lines = told(capsys, tiny_models["flux"].file)
    (line,) = [line for line in lines if "CFG parallel" in line]
    assert line.endswith("no use: its guidance is distilled, so that there is one prompt")


def test_a_diffusers_folder(capsys):
    lines = told(capsys, PIPELINE)
    assert any(line.startswith("diffusers' class: sd3, ") for line in lines)
    assert not any("--comfyui" in line for line in lines), "ComfyUI reads no folders"


def test_an_unknown_file_is_near_to_what_it_was_made_of(capsys, tiny_models, tmp_path):
    tensors = load_file(tiny_models["sd3"].file)
    taken = next(name for name in tensors if name.startswith("x_embedder.proj.weight"))
    tensors["entry.weight"] = tensors.pop(taken).flatten(1)
    tensors["final_layer.linear.weight"] = tensors["final_layer.linear.weight"][None].clone()
    save_file(tensors, tmp_path / "unknown.safetensors")

    lines = told(capsys, tmp_path / "unknown.safetensors")

    assert any(line.startswith("diffusers' class: no: ") for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("near "))
    assert lines[at].startswith("near sd3 in its release's names: ")
    assert "  in the file alone: entry.weight" in lines[at + 1]
    assert "x_embedder.proj.weight" in lines[at + 2]
    assert lines[at + 3] == "  of other dimensions: final_layer.linear.weight"


def test_a_file_of_something_else_is_near_nothing(capsys, tmp_path):
    save_file({"embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "words.safetensors")
    assert told(capsys, tmp_path / "words.safetensors")[-1] == "It is near no model that is known."


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_nearest_to_itself(family):
    (names, own), *_ = near._of_families([family])
    found = [near._compared(name, own, other) for name, other in near._of_families(FAMILIES)]
    assert max(found, key=lambda one: one["share"])["name"] == names


@pytest.mark.parametrize("name", ["nothing.safetensors", "nothing.gguf", "empty"])
def test_what_is_no_model_is_refused(capsys, tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert cli.main(["models", str(tmp_path / name)]) == cli.INVALID
    assert name in capsys.readouterr().err


def test_formats_are_told_by_headers(tmp_path):
    def of(tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        save_file(tensors, tmp_path / "file.safetensors", metadata or None)
        return quantisation(tmp_path / "file.safetensors", stored_tensors(tmp_path / "file.safetensors"))

    weight, words = torch.zeros(4, 4), list(json.dumps({"format": "nvfp4"}).encode())
    assert of({"a": weight}) == "none"
    assert of({"a": weight.to(torch.float8_e5m2)}) == "plain F8_E5M2"
    assert of({"a": weight, "scaled_fp8": torch.zeros(2)}) == "scaled fp8"
    said = {"a": weight, "a.comfy_quant": torch.tensor(words, dtype=torch.uint8)}
    assert of(said) == "ComfyUI's mixed precision: nvfp4 (1 layers)"
    with pytest.raises(InvalidInput, match="describes no format"):
        of({"a": weight, "a.comfy_quant": torch.zeros(4, dtype=torch.uint8)})


def test_what_stands_before_every_name_is_left_out(tmp_path):
    tensors = {"model.diffusion_model.a": torch.zeros(1), "vae.b": torch.zeros(1)}
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    assert list(stored_tensors(tmp_path / "checkpoint.safetensors")) == ["a"]
