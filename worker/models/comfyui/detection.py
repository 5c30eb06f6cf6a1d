"""What ComfyUI makes of a file: its model configuration, dtypes and names, as its own loader chooses them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import of_file
from worker.checkpoints import Checkpoint

Tensors = dict[str, torch.Tensor]
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FAST = "_fast"  # of a weight_dtype: multiplies in fp8 where the device can


@dataclass
class Detected:
    """A file as ComfyUI sees it.

    Args:
        config: ComfyUI's model configuration, its dtypes set.
        tensors: views of the file, without prefix and in ComfyUI's naming.
        dtype: of the weights; `manual_cast` is what is computed in where it is another.
        quantised: whether layers carry a format of their own (scaled fp8, mixed precision).
    """

    config: Any
    tensors: Tensors
    dtype: torch.dtype
    manual_cast: torch.dtype | None
    quantised: bool


def detect(checkpoint: Checkpoint, path: str, weight_dtype: str, device: torch.device) -> Detected:
    """Read the names and shapes of a file with ComfyUI's detection.

    Raises:
        InvalidInput: this ComfyUI does not know the model, or not the format of its weights.
    """
    with of_file(path):
        tensors, metadata = _without_prefix(checkpoint, path)
        # Of the file: a name in diffusers' spelling is converted, which writes new tensors.
        count, stored = comfy.utils.calculate_parameters(tensors), comfy.utils.weight_dtype(tensors)
        config, tensors = _config(tensors, metadata)
    if config is None:
        raise InvalidInput(
            f"this ComfyUI does not recognise the diffusion model in {path}; "
            "update ComfyUI, or choose a model of a family it knows."
        )
    quantised = any(vars(config).get(mark) is not None for mark in ("quant_config", "scaled_fp8"))
    dtype, manual_cast = _dtypes(config, count, None if quantised else stored, weight_dtype, device)
    return Detected(config, tensors, dtype, manual_cast, quantised)


def _config(tensors: Tensors, metadata: dict[str, str]) -> tuple[Any, Tensors]:
    detection = comfy.model_detection
    # The loader of ComfyUI 0.3.64 does not hand the metadata on.
    known = {"metadata": metadata} if _converts_formats() else {}
    config = detection.model_config_from_unet(tensors, "", **known)
    if config is not None:
        return config, tensors
    converted = detection.convert_diffusers_mmdit(tensors, "")
    return (detection.model_config_from_unet(converted, "") if converted else None), converted


def named(detected: Detected) -> Tensors:
    """Its tensors under the names of ComfyUI's class."""
    return detected.config.process_unet_state_dict(dict(detected.tensors))


def _without_prefix(checkpoint: Checkpoint, path: str) -> tuple[Tensors, dict[str, str]]:
    tensors, metadata = checkpoint.views()
    tensors, metadata = _current_format(tensors, metadata, path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    inner = comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True)
    return _current_format(inner, metadata, path) if inner else (tensors, metadata)


def _current_format(tensors: Tensors, metadata: dict[str, str], path: str) -> tuple[Tensors, dict[str, str]]:
    """Quantised layers in the one spelling that ComfyUI's operations read."""
    if _converts_formats():
        return comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    if "_quantization_metadata" in metadata or any(name.endswith(".comfy_quant") for name in tensors):
        raise InvalidInput(
            f"{path} holds quantised layers (_quantization_metadata), which this ComfyUI loads without their "
            "scales; update ComfyUI, or choose the fp16, bf16 or scaled fp8 file of the model."
        )
    return tensors, metadata


def _converts_formats() -> bool:
    """Whether this ComfyUI knows layers of several formats (0.8.0), or scaled fp8 alone (0.3.64)."""
    return hasattr(comfy.utils, "convert_old_quants")


def _dtypes(
    config: Any, count: int, stored: torch.dtype | None, weight_dtype: str, device: torch.device
) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of the weights, and what they are cast to for each operation; set in `config` too."""
    management, supported = comfy.model_management, list(config.supported_inference_dtypes)
    dtype = DTYPES.get(weight_dtype)
    if dtype is None:
        dtype = management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=stored)
    mixed = vars(config).get("quant_config") is not None
    manual_cast = management.unet_manual_cast(None if mixed else dtype, device, supported)
    set_dtype = config.set_inference_dtype
    more = {"device": device} if "device" in inspect.signature(set_dtype).parameters else {}
    set_dtype(dtype, manual_cast, **more)
    if weight_dtype.endswith(FAST):
        config.optimizations["fp8"] = True
    return dtype, manual_cast
