"""GGUF files, in every type that a diffusion model is published in; and what their weights are, by numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf")

# Types that the package quantises to, and those it only unpacks: where in a block the scales (fp16) are.
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
PACKED = (*QUANTISED, *SCALES)
Kinds = Callable[[str, torch.Tensor], str]


def packed(tensor: torch.Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """The blocks of a tensor, bytes by row; of types in SCALES random ones, as large on average."""
    stored = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quants.quantize(tensor.float().numpy(), stored)
    elements, size = gguf.GGML_QUANT_SIZES[stored]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (tensor.numel() // elements, size), dtype=np.uint8)
    most = np.abs(gguf.quants.dequantize(_scaled(blocks, kind, 1.0, generator), stored)).mean()
    blocks = _scaled(blocks, kind, float(tensor.float().abs().mean()) / most, generator)
    return blocks.reshape(*tensor.shape[:-1], -1)


def _scaled(blocks: np.ndarray, kind: str, scale: float, generator: np.random.Generator) -> np.ndarray:
    blocks = blocks.copy()
    for place in SCALES[kind]:
        scales = (scale * generator.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def unpacked(blocks: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers of blocks, fp32, as the gguf package unpacks them."""
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])).reshape(shape)


def write(
    file: Path, tensors: Mapping[str, torch.Tensor], kinds: Kinds, architecture: str = "wan"
) -> dict[str, torch.Tensor]:
    """Write a file in which each tensor is of the type that `kinds` says; its tensors as they can be read.

    One of five dimensions is stored as GGUF files have it: in one, with its shape in a field.
    """
    writer, read = gguf.GGUFWriter(file, architecture), {}
    for number, (name, tensor) in enumerate(tensors.items()):
        kind, shape = kinds(name, tensor), tuple(tensor.shape)
        if len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in shape])
            tensor = tensor.reshape(-1)
        blocks = packed(tensor, kind, number)
        is_bytes = blocks.dtype == np.uint8
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind] if is_bytes else None)
        read[name] = unpacked(blocks, kind, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def packed_as(kind: str) -> Kinds:
    """Matrices as `kind` where their rows have whole blocks of it, other weights as published files do."""
    elements = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]

    def chosen(_name: str, tensor: torch.Tensor) -> str:
        if tensor.ndim == 2 and tensor.shape[-1] % elements == 0:
            return kind
        return "F32" if tensor.ndim < 2 else "F16"

    return chosen
