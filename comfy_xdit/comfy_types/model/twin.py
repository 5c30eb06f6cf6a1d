"""The twin: ComfyUI's own model class over meta tensors, which has every shape and no weight.

It gives the latent format, the noise schedule, the extra conditioning and the LoRA keys of a model
whose weights are in the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.utils
import torch
from safetensors import safe_open

from comfy_xdit.comfy_types.model.residuals import lend_embedders
from comfy_xdit.comfy_types.model.weights import take_away
from comfy_xdit.protocol import safetensors_header
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META, of_file, on_meta

Tensors = dict[str, torch.Tensor]
# Names of safetensors headers. What is not here (packed formats) has bytes for elements.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def build_twin(path: str | Path, dtype: torch.dtype, manual_cast: torch.dtype | None = None) -> Any:
    """ComfyUI's BaseModel for the transformer at `path`, on the meta device.

    Args:
        path: a safetensors file, a diffusers transformer folder, or a pipeline that has one.
        dtype: what ComfyUI casts the transformer's inputs to, unless there is a `manual_cast`.

    Raises:
        InvalidInput: this ComfyUI does not know the family, or the file is no safetensors file.
    """
    config, shapes = detect(Path(path))
    config.set_inference_dtype(dtype, manual_cast)
    config.custom_operations = _twin_operations()
    with of_file(path):
        twin = on_meta(lambda: config.get_model(dict(shapes), "", device=META))
    # Shared by all clones. Nothing of this model needs the host's memory, and a host without any
    # free still gets positive and negative in one call.
    twin.memory_required = lambda *_, **__: 0
    twin.state_dict_for_saving = _refuse_saving
    take_away(twin, "diffusion_model")
    lend_embedders(twin.diffusion_model, transformer_files(Path(path)))
    return twin


def transformer_files(path: Path) -> list[Path]:
    """The safetensors file at `path`, or the shards in a diffusers folder or a pipeline."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(
            f"no .safetensors file in {folder}; choose a diffusers folder with a transformer in safetensors."
        )
    return files


def read_header(file: Path) -> dict[str, torch.Tensor]:
    """Meta tensors by name; reads the header of a safetensors file and none of its weights.

    Raises:
        InvalidInput: it is no safetensors file, or damaged.
    """
    return {
        name: torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.uint8), device=META)
        for name, tensor in safetensors_header.read_header(file).items()
    }


def detect(path: Path) -> tuple[Any, Tensors]:
    """ComfyUI's model configuration for the transformer at `path`, and meta tensors in ComfyUI's naming.

    Raises:
        InvalidInput: this ComfyUI does not know the family, or the file is no safetensors file.
    """
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for file in transformer_files(path):
        tensors |= read_header(file)
        with safe_open(file, framework="pt") as stored:
            metadata |= stored.metadata() or {}
    with of_file(path):
        prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
        inner = comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True)
        tensors = inner or tensors
        config, tensors = _config(tensors, metadata)
    if config is None:
        raise InvalidInput(
            f"this ComfyUI does not recognise the diffusion model in {path}; "
            "update ComfyUI, or choose a model of a family it knows."
        )
    return config, tensors


def _config(tensors: Tensors, metadata: dict[str, str]) -> tuple[Any, Tensors]:
    detection = comfy.model_detection
    # The loader of ComfyUI 0.3.64 does not hand the metadata on.
    known = {"metadata": metadata} if hasattr(comfy.utils, "convert_old_quants") else {}
    config = detection.model_config_from_unet(tensors, "", **known)
    if config is None:
        converted = detection.convert_diffusers_mmdit(dict(tensors), "")
        config = detection.model_config_from_unet(converted, "") if converted else None
        tensors = converted or tensors
    return config, tensors


def _twin_operations() -> type:
    """Layer classes that have parameters on every host.

    A host with ComfyUI's dynamic VRAM creates layers without weights, and LoRA then finds nothing
    to attach to; layer classes with a `_load_from_state_dict` of their own are spared that.
    """
    stock = comfy.ops.disable_weight_init
    layers = {
        name: type(name, (layer,), {"_load_from_state_dict": _loading_like(layer)})
        for name, layer in vars(stock).items()
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module)
    }
    return type("TwinOperations", (stock,), layers)


def _loading_like(layer: type) -> Callable[..., None]:
    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        layer._load_from_state_dict(self, *args, **kwargs)

    return _load_from_state_dict


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise InvalidInput(
        "the weights of an xDiT MODEL are in the ranks, so it cannot be saved or merged; "
        "load it with a stock loader node for that."
    )
