"""Which class a diffusion model has in the ranks: diffusers', where it does more, or ComfyUI's own."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from comfy_xdit.comfy_types.installation import host_comfyui
from comfy_xdit.comfy_types.twin import detect, read_header
from comfy_xdit.protocol.spec import HostComfyUI

# Environment: "comfyui" has every single file in ComfyUI's own class.
FORCED = "XDIT_CLASSES"
# ComfyUI's configurations of the models whose diffusers class the ranks know: with it go PipeFusion, and
# ControlNets and IP-Adapters in the ranks.
IN_DIFFUSERS = ("SD3", "Flux", "FluxSchnell")
MARKS = ("scaled_fp8", ".comfy_quant", ".scale_weight", ".weight_scale")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def comfyui_for(path: Path, weight_dtype: str) -> HostComfyUI | None:
    """This ComfyUI, where the model at `path` runs in its class; None for diffusers' class.

    A diffusers folder is diffusers' own. Of the models that both know a file in a plain dtype is, too; a
    quantised one is ComfyUI's, and one stored in plain fp8 is unless another dtype is asked for.

    Raises:
        InvalidInput: it is no safetensors file, or this ComfyUI does not know it.
    """
    if not path.is_file():
        return None
    if os.environ.get(FORCED) == "comfyui" or not _is_plain(path, weight_dtype):
        return host_comfyui()
    config, _ = detect(path)
    return None if type(config).__name__ in IN_DIFFUSERS else host_comfyui()


def _is_plain(path: Path, weight_dtype: str) -> bool:
    shapes = read_header(path)
    if any(name.endswith(MARKS) for name in shapes) or weight_dtype.startswith("fp8"):
        return False
    counts: Counter[torch.dtype] = Counter()
    for tensor in shapes.values():
        counts[tensor.dtype] += tensor.numel()
    most = counts.most_common(1)
    return weight_dtype != "default" or not most or most[0][0] not in FP8
