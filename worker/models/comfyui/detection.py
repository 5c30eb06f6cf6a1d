"""What ComfyUI makes of a file: its model configuration, dtypes and names, as its own loader chooses them."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.gguf_header import is_gguf
from comfy_xdit.protocol.outline import MISFITS, of_file
from comfy_xdit.protocol.quantised import MARKS
from worker.checkpoints import Checkpoint

if TYPE_CHECKING:
    from worker.models.comfyui.gguf_file import GGUFFile

Tensors = dict[str, torch.Tensor]
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
MAX_SAID = 10_000  # bytes in which a layer says its format
FAST = "_fast"  # of a weight_dtype: multiplies in fp8 where the device can


@dataclass
class Detected:
    """A file as ComfyUI sees it.

    Args:
        config: ComfyUI's model configuration, its dtypes set.
        tensors: of the transformer, views of the file, without prefix and in ComfyUI's naming.
        given: what ComfyUI builds its model from: `tensors`, or a whole checkpoint.
        prefix: of the transformer in `given`.
        dtype: of the weights; `manual_cast` is what is computed in where it is another.
        quantised: whether layers carry a format of their own (scaled fp8, mixed precision).
        packed: whether weights stay packed, as those of a GGUF file do (PackedWeight).
    """

    config: Any
    tensors: Tensors
    given: Tensors
    prefix: str
    dtype: torch.dtype
    manual_cast: torch.dtype | None
    quantised: bool
    packed: bool = False

    def model(self, device: torch.device) -> Any:
        """ComfyUI's BaseModel on `device`, its weights not read."""
        return self.config.get_model(dict(self.given), self.prefix, device=device)


def open_file(path: str) -> Checkpoint | GGUFFile:
    """The file of a diffusion model, or of a whole checkpoint, of which only that is read.

    Raises:
        InvalidInput: it is damaged, or of a kind that is not read.
    """
    if not is_gguf(Path(path)):
        return Checkpoint([Path(path)], quantised=True, transformer=True)
    from worker.models.comfyui.gguf_file import GGUFFile  # which needs a package that no other file does

    return GGUFFile(Path(path))


def detect(
    checkpoint: Checkpoint | GGUFFile,
    path: str,
    weight_dtype: str,
    device: torch.device,
    whole: bool = False,
) -> Detected:
    """Read the names and shapes of a file with ComfyUI's detection.

    Args:
        whole: as its checkpoint loader reads the transformer in a checkpoint; else as UNETLoader does.

    Raises:
        InvalidInput: this ComfyUI does not know the model, or not the format of its weights.
    """
    packed = is_gguf(Path(path))
    if packed and weight_dtype.startswith("fp8"):
        raise InvalidInput(
            f"weight_dtype {weight_dtype} does not go with {Path(path).name}, whose weights are packed; "
            "set weight_dtype to default, bf16 or fp16: what they are unpacked to."
        )
    see = _in_checkpoint if whole else _alone
    with of_file(path):
        config, given, prefix, count, stored = see(checkpoint, path)
    if config is None:
        said = f" (architecture {checkpoint.architecture!r})" if packed else ""
        raise InvalidInput(
            f"this ComfyUI does not recognise the diffusion model in {path}{said}; "
            "update ComfyUI, or choose a model of a family it knows."
        )
    tensors = _below(given, prefix)
    quantised = any(vars(config).get(mark) is not None for mark in ("quant_config", "scaled_fp8"))
    stored = None if quantised or packed else stored
    dtype, manual_cast = _dtypes(config, count, stored, weight_dtype, device)
    return Detected(config, tensors, given, prefix, dtype, manual_cast, quantised, packed)


def named(detected: Detected) -> Tensors:
    """Its tensors under the names of ComfyUI's class."""
    return detected.config.process_unet_state_dict(dict(detected.tensors))


# A configuration or None, what it was found in, the transformer's prefix there, how many numbers the
# transformer has, and the dtype most are stored in.
Seen = tuple[Any, Tensors, str, int, torch.dtype]


def _in_checkpoint(checkpoint: Checkpoint, path: str) -> Seen:
    tensors, metadata = checkpoint.views()
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    counted = comfy.utils.calculate_parameters(tensors, prefix), comfy.utils.weight_dtype(tensors, prefix)
    tensors, metadata = _current_format(tensors, metadata, path, prefix)
    config = comfy.model_detection.model_config_from_unet(tensors, prefix, metadata=metadata)
    return config, tensors, prefix, *counted


def _alone(checkpoint: Checkpoint | GGUFFile, path: str) -> Seen:
    tensors, metadata = _without_prefix(checkpoint, path)
    # Of the file: a name in diffusers' spelling is converted, which writes new tensors.
    counted = comfy.utils.calculate_parameters(tensors), comfy.utils.weight_dtype(tensors)
    config, tensors = _config(tensors, metadata)
    return config, tensors, "", *counted


def kept_bytes(detected: Detected, tensors: Tensors) -> int:
    """What these tensors of its file take in a rank: as stored in layers that have a format of their own."""
    size = detected.dtype.itemsize
    formatted = {name.rpartition(".")[0] for name in tensors if detected.quantised and name.endswith(MARKS)}

    def is_as_stored(name: str, tensor: torch.Tensor) -> bool:
        return name.rpartition(".")[0] in formatted or _is_packed(tensor)

    return sum(t.nbytes if is_as_stored(n, t) else t.numel() * size for n, t in tensors.items())


def _config(tensors: Tensors, metadata: dict[str, str]) -> tuple[Any, Tensors]:
    """ComfyUI's configuration of a model, None of one it does not know; and the tensors in its naming."""
    detection = comfy.model_detection
    # The loader of ComfyUI 0.3.64 does not hand the metadata on.
    known = {"metadata": metadata} if _converts_formats() else {}
    config = detection.model_config_from_unet(tensors, "", **known)
    if config is None:
        tensors = detection.convert_diffusers_mmdit(tensors, "")
        config = detection.model_config_from_unet(tensors, "") if tensors else None
    return config, tensors


def _is_packed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _without_prefix(checkpoint: Checkpoint | GGUFFile, path: str) -> tuple[Tensors, dict[str, str]]:
    tensors, metadata = checkpoint.views()
    tensors, metadata = _current_format(tensors, metadata, path)
    inner = _below(tensors, comfy.model_detection.unet_prefix_from_state_dict(tensors))
    return _current_format(inner, metadata, path) if inner else (tensors, metadata)


def _below(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _current_format(
    tensors: Tensors, metadata: dict[str, str], path: str, prefix: str = ""
) -> tuple[Tensors, dict[str, str]]:
    """Quantised layers, below `prefix`, in the one spelling that ComfyUI's operations read."""
    if _converts_formats():
        try:
            tensors, metadata = comfy.utils.convert_old_quants(tensors, prefix, metadata=metadata)
            _check_formats(tensors, path)
        except MISFITS as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{path} says of its quantised layers what this ComfyUI does not understand "
                f"({type(error).__name__}: {error}); download it again."
            ) from error
        return tensors, metadata
    marked = any(name.startswith(prefix) and name.endswith(".comfy_quant") for name in tensors)
    if marked or "_quantization_metadata" in metadata:
        raise InvalidInput(
            f"{path} holds quantised layers (_quantization_metadata), which this ComfyUI loads without their "
            "scales; update ComfyUI, or choose the fp16, bf16 or scaled fp8 file of the model."
        )
    return tensors, metadata


def _check_formats(tensors: Tensors, path: str) -> None:
    """Raise InvalidInput for a layer in a format that this ComfyUI does not know."""
    known = importlib.import_module("comfy.quant_ops").QUANT_ALGOS
    for name, told in tensors.items():
        if name.endswith(".comfy_quant"):
            said = json.loads(bytes(told.flatten()[:MAX_SAID].tolist()))["format"]
            if not isinstance(said, str) or said not in known:
                raise InvalidInput(
                    f"{path} holds layers as {said!r} ({name}), which this ComfyUI does not read (it reads "
                    f"{', '.join(known)}); update ComfyUI, or choose another file of the model."
                )


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
