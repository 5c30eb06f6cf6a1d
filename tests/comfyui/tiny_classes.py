"""Tiny random files of ComfyUI's own classes, in the format and naming that its loaders read."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.inputs import SHIM
from worker.models.comfyui.cases import CASES, Case

# Of no class's file, but of the checkpoint around it: only the checkpoint loader reads it.
_CONDITIONER = "the stock UNETLoader lacks the file's conditioner and fails"
IN_CHECKPOINTS_ONLY = dict.fromkeys(("stable audio", "stable audio inpaint", "stable audio 3"), _CONDITIONER)

# What stands before every name in the published files of a class, and by what ComfyUI tells them.
PREFIXES = {"PixDiT_T2I": "core."}
# By what ComfyUI tells a class of another where both have the same widths only in published files.
SAID = {"NextDiTPixelSpace": {"image_model": "zimage_pixel"}}


def module_of(case: Case) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The class with random weights, every one of them, and its size. Skips where this ComfyUI has none."""
    from worker.models.comfyui.cases.models import tiny_model

    try:
        module, size = tiny_model(case, torch.device("cpu"))
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"this ComfyUI has no {case.name}, or not this variant of it: {error}")
    parts = {f"comfy.ldm.{case.module}.{part}": told for part, told in case.parts.items()}
    return module, size | ({"parts": parts} if parts else {})


def why_no_file(name: str) -> str:
    """Why a case has no tiny file; "" if it has one."""
    if CASES[name].build is not None:
        return "its class takes no size, so that it has no tiny file"
    return IN_CHECKPOINTS_ONLY.get(name, "")


def write(name: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> str:
    """Write the file of a case, or one of other sizes; its name for the loaders."""
    if why := why_no_file(name):
        pytest.skip(why)
    sys.path.append(str(SHIM))
    tiny_detection = importlib.import_module("tiny_detection")
    sys.path.remove(str(SHIM))
    file = f"{name.replace(' ', '_').replace(',', '')}.safetensors"
    with torch.inference_mode(False):
        module, size = module_of(replace(CASES[name], size={**CASES[name].size, **sizes}))
        prefix = PREFIXES.get(CASES[name].name, "")
        state = module.state_dict().items()
        tensors = {f"{prefix}{key}": tensor.to(dtype).contiguous() for key, tensor in state}
        tensors[tiny_detection.key(size | SAID.get(CASES[name].name, {}))] = torch.zeros(1)
        save_file(tensors, folder / file)
    return file
