"""Tiny random files of ComfyUI's own classes, in the format and naming that its loaders read."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.inputs import SHIM
from worker.models.comfyui.cases import CASES, Case

# Of no class's file, but of the checkpoint around it: only the checkpoint loader reads it.
IN_CHECKPOINTS_ONLY = {"stable audio": "the stock UNETLoader lacks the file's conditioner and fails"}


def module_of(case: Case) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The class with random weights, every one of them, and its size. Skips where this ComfyUI has none."""
    import comfy.ops

    try:
        made = getattr(importlib.import_module(f"comfy.ldm.{case.module}"), case.name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {case.name}")
    size = known(made, case.size)
    torch.manual_seed(0)
    try:
        module = made(**size, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    except TypeError as error:
        pytest.skip(f"this ComfyUI's {case.name} has no such variant: {error}")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("freqs", "inv_freq")):
            torch.nn.init.normal_(tensor, std=0.08)
    return module.eval().requires_grad_(False), {k: v for k, v in size.items() if k != "image_model"}


def known(made: type, size: dict[str, Any]) -> dict[str, Any]:
    """Of a class whose sizes are a dataclass: those of this version."""
    names = {f"{made.__name__.lower()}params"}
    for name, value in vars(sys.modules[made.__module__]).items():
        if name.lower() in names and inspect.isclass(value):
            size = {key: part for key, part in size.items() if key in value.__dataclass_fields__}
            if "image_model" in value.__dataclass_fields__:
                size["image_model"] = None
    return size


def write(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write the file of a case; its name for the loaders."""
    if name in IN_CHECKPOINTS_ONLY:
        pytest.skip(IN_CHECKPOINTS_ONLY[name])
    sys.path.append(str(SHIM))
    tiny_detection = importlib.import_module("tiny_detection")
    sys.path.remove(str(SHIM))
    file = f"{name.replace(' ', '_').replace(',', '')}.safetensors"
    with torch.inference_mode(False):
        module, size = module_of(CASES[name])
        tensors = {key: tensor.to(dtype).contiguous() for key, tensor in module.state_dict().items()}
        tensors[tiny_detection.key(size)] = torch.zeros(1)
        save_file(tensors, folder / file)
    return file
