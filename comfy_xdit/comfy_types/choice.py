"""What the ranks are told of a diffusion model, to choose its class by: ComfyUI's own or diffusers'."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from comfy_xdit.comfy_types.installation import host_comfyui
from comfy_xdit.comfy_types.model.twin import detect, read_header
from comfy_xdit.protocol.gguf_header import is_gguf
from comfy_xdit.protocol.quantised import MARKS, refuse_foreign
from comfy_xdit.protocol.spec import ModelSpec

# Environment: "comfyui" has every single file in ComfyUI's own class.
FORCED = "XDIT_CLASSES"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def spec_of(path: Path, weight_dtype: str) -> ModelSpec:
    """The diffusion model at `path`.

    A diffusers folder is diffusers' own. A file in a plain dtype goes with ComfyUI's name of the model: the
    ranks have it in diffusers' class where they know one, which does more. A quantised or GGUF file is
    ComfyUI's, and one stored in plain fp8 is unless another dtype is asked for.

    Raises:
        InvalidInput: it is no safetensors or GGUF file, or this ComfyUI does not know it.
    """
    if not path.is_file():
        return ModelSpec.of(path, "transformer", weight_dtype)
    name, shapes = "", read_header(path)
    refuse_foreign(shapes, path.name)
    if os.environ.get(FORCED) != "comfyui" and not is_gguf(path) and _is_plain(shapes, weight_dtype):
        name = type(detect(path)[0]).__name__
    return ModelSpec.of(path, "transformer", weight_dtype, host_comfyui(), name)


def _is_plain(shapes: Mapping[str, torch.Tensor], weight_dtype: str) -> bool:
    if any(name.endswith(MARKS) for name in shapes) or weight_dtype.startswith("fp8"):
        return False
    counts: Counter[torch.dtype] = Counter()
    for tensor in shapes.values():
        counts[tensor.dtype] += tensor.numel()
    most = counts.most_common(1)
    return weight_dtype != "default" or not most or most[0][0] not in FP8
