"""A GGUF file as the weights of a model: names and shapes as in the original release, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.gguf_header import read_header
from comfy_xdit.protocol.safetensors_header import StoredTensor
from worker.models.comfyui.packed import PackedWeight, packed_types

# GGML's types that are no blocks of several elements.
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class GGUFFile:
    """One file, of which `views` gives every tensor; as `Checkpoint` is for safetensors.

    Raises:
        InvalidInput: it is no GGUF file, or a tensor is packed in a way that cannot be unpacked here.
    """

    def __init__(self, path: Path):
        self._path = path
        self._header = read_header(path)  # which finds out first whether it is a file
        self._stamp = _stamp(path)
        known = packed_types()
        for name, tensor in self._header.tensors.items():
            if tensor.dtype not in PLAIN and tensor.dtype not in known:
                raise InvalidInput(
                    f"{path.name} holds {name} as {tensor.dtype}, which cannot be unpacked here "
                    f"({', '.join(known)} can); choose another file of the model, e.g. Q4_K_M or Q8_0."
                )

    @property
    def architecture(self) -> str:
        """What it says it is; "" where it says nothing."""
        return self._header.architecture

    def views(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Every tensor under its name in the file, as a view of the file's memory map; and no metadata.

        Raises:
            InvalidInput: the file is no longer the one whose header was read.
        """
        self.check_unchanged()
        size = self._stamp[0]
        mapped = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        self.check_unchanged()
        return {name: _view(mapped, tensor) for name, tensor in self._header.tensors.items()}, {}

    def check_unchanged(self) -> None:
        """Raise InvalidInput if the file is no longer the one whose header was read."""
        if not self._path.exists() or _stamp(self._path) != self._stamp:
            raise InvalidInput(
                f"{self._path} was changed or removed after it was loaded; run the loader node again."
            )

    def common_dtype(self) -> torch.dtype:
        """What most of its numbers are computed in where nothing else is asked for."""
        return torch.float16


def _view(mapped: torch.Tensor, tensor: StoredTensor) -> torch.Tensor:
    stored = mapped[tensor.start : tensor.stop]
    if tensor.dtype in PLAIN:
        return stored.view(PLAIN[tensor.dtype]).view(tensor.shape)
    return PackedWeight(stored, tensor.dtype, tensor.shape, torch.float16)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
