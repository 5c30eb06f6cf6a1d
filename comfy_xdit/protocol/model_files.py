"""What a diffusion model's files hold, by their headers: safetensors, GGUF, or a diffusers folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from comfy_xdit.protocol import gguf_header, safetensors_header
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.quantised import MARKS
from comfy_xdit.protocol.regular_files import check_there
from comfy_xdit.protocol.safetensors_header import StoredTensor

# What a file of more than the transformer, or a trainer, puts before every name.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
MAX_SAID = 1 << 16  # bytes of a layer's description that are read
_FLOATS = ("F64", "F32", "F16", "BF16")
Stored = Mapping[str, StoredTensor]


def transformer_files(path: Path) -> list[Path]:
    """The file at `path`, or those of the transformer in a diffusers folder or pipeline.

    Raises:
        InvalidInput: there is none.
    """
    check_there(path, "a model that exists")
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"no .safetensors file in {folder}; choose one with a transformer in safetensors.")
    plain = [file for file in files if ".fp16." not in file.name and ".bf16." not in file.name]
    return plain or files


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model at `path`, without what stands before all names.

    Raises:
        InvalidInput: nothing is there, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in transformer_files(path):
        if gguf_header.is_gguf(file):
            tensors |= gguf_header.read_header(file).tensors
        else:
            tensors |= safetensors_header.read_header(file)
    for prefix in PREFIXES:
        inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if inner:
            return inner
    return tensors


def numbers_by_dtype(tensors: Stored) -> dict[str, int]:
    """How many numbers there are in each dtype, most first."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    return dict(counts.most_common())


def quantisation(path: Path, tensors: Stored) -> str:
    """In which format its weights are, in words."""
    if gguf_header.is_gguf(path):
        packed = [dtype for dtype in numbers_by_dtype(tensors) if dtype not in _FLOATS]
        return f"GGUF, packed as {', '.join(packed)}" if packed else "GGUF, not packed"
    if path.is_file() and (formats := _formats(path, tensors)):
        return f"ComfyUI's mixed precision: {', '.join(formats)}"
    if any(name.endswith("scaled_fp8") for name in tensors):
        return "scaled fp8"
    if marks := [name for name in tensors if name.endswith(MARKS)]:
        return f"quantised, with scales ({marks[0]})"
    fp8 = [dtype for dtype in numbers_by_dtype(tensors) if dtype.startswith("F8_")]
    return f"plain {', '.join(fp8)}" if fp8 else "none"


def _formats(path: Path, tensors: Stored) -> list[str]:
    """What layers say of their formats, most first."""
    counts: Counter[str] = Counter()
    with path.open("rb") as stream:
        for name, tensor in tensors.items():
            if name.endswith(".comfy_quant") and tensor.stop - tensor.start <= MAX_SAID:
                stream.seek(tensor.start)
                try:
                    counts[str(json.loads(stream.read(tensor.stop - tensor.start))["format"])] += 1
                except (ValueError, KeyError, TypeError) as error:
                    raise InvalidInput(f"{path}: {name} describes no format; download it again.") from error
    return [f"{kind} ({count} layers)" for kind, count in counts.most_common()]
