"""Memory two processes see: an anonymous file that a child inherits. No name, so nothing is left behind.

A `memfd` rather than `/dev/shm`: containers often limit `/dev/shm` to 64 MiB, and a named segment
outlives a host that was killed. Tensors lie in it as in a safetensors file: raw little-endian
bytes, with dtype, shape and offset in the (signed) head of the message.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
from typing import Any

import torch

from comfy_xdit.protocol.errors import shown

ALIGNMENT = 64
# The first bytes are four numbers: how many messages the reader has read; when the interpreter of the writer
# last ran (seconds of the monotonic clock); how far its own work has come; whether its device works.
HEADER_BYTES = 64
# A segment above this is given back once a message needs less than a quarter of it.
KEPT_BYTES = 256 << 20
# What may cross: numbers whose bytes say all. A quantised tensor has a scale beside them.
_NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_DTYPES = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
MOST_ELEMENTS = 1 << 48  # far above any memory, far below what overflows
MOST_DIMS = 64  # of PyTorch's tensors
_FIELDS = {"dtype", "shape", "offset"}


class Segment:
    """One direction of traffic: one process writes, others read."""

    def __init__(self, descriptor: int | None = None):
        self.descriptor = anonymous_file() if descriptor is None else descriptor
        try:
            if descriptor is None:
                os.ftruncate(self.descriptor, mmap.PAGESIZE)
            self._map = mmap.mmap(self.descriptor, mmap.PAGESIZE)
        except OSError:
            self.close()
            raise

    def write(self, tensors: list[torch.Tensor], base: int = HEADER_BYTES) -> list[dict[str, Any]]:
        """Lay the tensors (any device) into the segment from `base` on; the result goes into the head.

        Raises:
            TypeError: a tensor is quantised, sparse or of another dtype than plain numbers.
        """
        entries, offset = [], -(-base // ALIGNMENT) * ALIGNMENT
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES or tensor.layout is not torch.strided:
                raise TypeError(f"a {tensor.layout} tensor of {dtype} cannot cross the bridge")
            entries.append({"dtype": dtype, "shape": list(tensor.shape), "offset": offset})
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._reserve(offset)
        for tensor, entry in zip(tensors, entries, strict=True):
            if tensor.numel():
                self._view(entry).copy_(tensor)
        return entries

    def read(self, entries: list[dict[str, Any]], device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """Copy the tensors out, straight to `device`.

        Raises:
            ValueError: an entry of the head is nothing that lies in this segment.
        """
        if not isinstance(entries, list):
            raise ValueError(f"a message names tensors by {type(entries).__name__}, where a list is due")
        return [self._read_one(entry, device) for entry in entries]

    @property
    def acknowledged(self) -> int:
        """How many messages the reader says it has read."""
        return struct.unpack_from("<q", self._map)[0]

    @acknowledged.setter
    def acknowledged(self, number: int) -> None:
        struct.pack_into("<q", self._map, 0, number)

    @property
    def heartbeat(self) -> float:
        """When the writer last showed that it lives; 0 before the first time."""
        return struct.unpack_from("<d", self._map, 8)[0]

    @heartbeat.setter
    def heartbeat(self, now: float) -> None:
        struct.pack_into("<d", self._map, 8, now)

    def close(self) -> None:
        """Close the file; the memory goes when the last view is gone, whoever still refers to this."""
        os.close(self.descriptor)
        # A map has a descriptor of its own, and an error that somebody keeps refers to what was in use.
        self._map = bytearray(HEADER_BYTES)

    @property
    def beats(self) -> int:
        """Grows with the writer's own work."""
        return struct.unpack_from("<q", self._map, 16)[0]

    @beats.setter
    def beats(self, number: int) -> None:
        struct.pack_into("<q", self._map, 16, number)

    @property
    def device_works(self) -> bool:
        """Whether the writer's device had work to do when it last looked."""
        return bool(struct.unpack_from("<q", self._map, 24)[0])

    @device_works.setter
    def device_works(self, works: bool) -> None:
        struct.pack_into("<q", self._map, 24, works)

    def _read_one(self, entry: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        dtype, shape, end = _checked(entry)
        # Asked each time: what is mapped may have been cut off since.
        size = os.fstat(self.descriptor).st_size
        if end > size:
            raise ValueError(f"the segment holds {size} bytes, a message names {end}")
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        return self._view(entry).to(device, copy=True)

    def _view(self, entry: dict[str, Any]) -> torch.Tensor:
        dtype, shape, end = _checked(entry)
        if len(self._map) < end:
            self._remap(end)
        count = math.prod(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry["offset"]).view(shape)

    def _reserve(self, size: int) -> None:
        held = len(self._map)
        if held < size or (held > KEPT_BYTES and size < held // 4):
            size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self.descriptor, size)
            self._remap(size)

    def _remap(self, needed: int) -> None:
        size = os.fstat(self.descriptor).st_size
        if size < needed:
            raise ValueError(f"the segment holds {size} bytes, the message names {needed}")
        # The old map is dropped, not closed: a view of it may still be alive.
        self._map = mmap.mmap(self.descriptor, size)


def _checked(entry: dict[str, Any]) -> tuple[torch.dtype, list[int], int]:
    """Dtype, shape and end (bytes) of an entry in a head; every field of it is looked at."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"a message names a tensor by {shown(entry)}, where dtype, shape and offset are due")
    name, shape, offset = entry["dtype"], entry["shape"], entry["offset"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"a message names the dtype {shown(name)}; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"a message names the shape {shown(shape)}; a list of numbers from 0 on is one")
    if len(shape) > MOST_DIMS or math.prod(max(n, 1) for n in shape) > MOST_ELEMENTS:
        raise ValueError(f"a message names the shape {shown(shape)}, which is more than any memory holds")
    if type(offset) is not int or offset < HEADER_BYTES or offset % ALIGNMENT:
        raise ValueError(
            f"a message names the offset {shown(offset)}; a multiple of {ALIGNMENT} from {HEADER_BYTES} on "
            "is one"
        )
    return _DTYPES[name], shape, offset + math.prod(shape) * _DTYPES[name].itemsize


def anonymous_file() -> int:
    """A descriptor of a file without a name, which only children inherit that are given it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("comfy_xdit", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
