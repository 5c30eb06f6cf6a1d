"""What ComfyUI makes of a file with a diffusion model: by its header, and what little else it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.utils
import torch
from safetensors import SafetensorError, safe_open

from comfy_xdit.protocol import gguf_header, safetensors_header
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META, asks_for_numbers, of_file

Tensors = dict[str, torch.Tensor]
# Names in the headers of safetensors and GGUF. What is not here (packed formats) has bytes for elements.
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


@dataclass
class Detected:
    """A file as ComfyUI sees it. Tensors with weights of the transformer are on the meta device.

    Args:
        config: ComfyUI's model configuration.
        tensors: of the transformer, in ComfyUI's naming and without prefix.
        given: what the configuration builds its model from: `tensors`, or the whole checkpoint.
        prefix: of the transformer in `given`.
    """

    config: Any
    tensors: Tensors
    given: Tensors
    prefix: str = ""

    @property
    def checkpoint(self) -> bool:
        """Whether it is a whole checkpoint."""
        return bool(self.prefix)


def detect(path: Path, checkpoint: bool = False, numbers: bool = False) -> Detected:
    """The transformer at `path`.

    Args:
        path: a safetensors file, a diffusers transformer folder, or a pipeline that has one.
        checkpoint: as ComfyUI's checkpoint loader sees it, if it does; else as UNETLoader does.
        numbers: with the transformer's vectors as they are in the file, of which norms may tell what it
            predicts; also where detection asks for them.

    Raises:
        InvalidInput: this ComfyUI does not know the family, or the file is no safetensors file.
    """
    try:
        return _detect(path, checkpoint, numbers)
    except RuntimeError as error:
        if numbers or not asks_for_numbers(error):
            raise
    return _detect(path, checkpoint, True)


def _detect(path: Path, checkpoint: bool, numbers: bool) -> Detected:
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for file in transformer_files(path):
        tensors |= read_header(file)
        if not gguf_header.is_gguf(file):
            metadata |= _fill_in(tensors, file, checkpoint, numbers)
    with of_file(path):
        prefix = _prefix(tensors)
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if checkpoint and prefix:
            config = comfy.model_detection.model_config_from_unet(dict(tensors), prefix, metadata=metadata)
            if config is not None:
                return Detected(config, own, tensors, prefix)
        config, own = _alone(own, metadata)
    if config is None:
        raise InvalidInput(
            f"this ComfyUI does not recognise the diffusion model in {path}; "
            "update ComfyUI, or choose a model of a family it knows."
        )
    return Detected(config, own, own)


def transformer_files(path: Path) -> list[Path]:
    """The file at `path`, or the shards in a diffusers folder or a pipeline."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(
            f"no .safetensors file in {folder}; choose a diffusers folder with a transformer in safetensors."
        )
    return files


def read_header(file: Path) -> Tensors:
    """Meta tensors by name; reads the header of a safetensors or GGUF file and none of its weights.

    Raises:
        InvalidInput: it is neither, or damaged.
    """
    gguf = gguf_header.is_gguf(file)
    stored = gguf_header.read_header(file).tensors if gguf else safetensors_header.read_header(file)
    other = torch.float16 if gguf else torch.uint8  # a packed weight of GGUF has the shape it unpacks to
    return {
        name: torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, other), device=META)
        for name, tensor in stored.items()
    }


def _fill_in(tensors: Tensors, file: Path, checkpoint: bool, numbers: bool) -> dict[str, str]:
    """Put the numbers in that ComfyUI may ask for, as views of the file. Returns its metadata.

    In a checkpoint these are what stands around the transformer (limits of noise, embedders of a
    conditioning): this process reads text encoders and VAE anyway. With `numbers` vectors, too.
    """
    prefix = _prefix(tensors) if checkpoint else ""
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if (numbers and tensors[name].ndim < 2) or not name.startswith(prefix):
                    tensors[name] = stored.get_tensor(name)
            return stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}; download it again.") from error


def _prefix(tensors: Tensors) -> str:
    """What the names of the transformer begin with in a checkpoint; "" where it is alone."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    return prefix if any(name.startswith(prefix) for name in tensors) else ""


def _alone(tensors: Tensors, metadata: dict[str, str]) -> tuple[Any, Tensors]:
    """As UNETLoader sees a transformer without prefix; None for one that it does not know."""
    detection = comfy.model_detection
    # The loader of ComfyUI 0.3.64 does not hand the metadata on.
    known = {"metadata": metadata} if hasattr(comfy.utils, "convert_old_quants") else {}
    config = detection.model_config_from_unet(dict(tensors), "", **known)
    if config is None:
        converted = detection.convert_diffusers_mmdit(dict(tensors), "")
        config = detection.model_config_from_unet(converted, "") if converted else None
        tensors = converted or tensors
    return config, tensors
