"""Memory two processes see: an anonymous file that a child inherits. No name, so nothing is left behind.

A `memfd` rather than `/dev/shm`: containers often limit `/dev/shm` to 64 MiB, and a named segment
outlives a host that was killed. Tensors lie in it as in a safetensors file: raw little-endian
bytes, with dtype, shape and offset in the (signed) head of the message.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from typing import Any

import torch

ALIGNMENT = 64
# The first bytes are two numbers: how many messages the reader has read, and when the writer last
# showed that it lives (seconds of the machine's monotonic clock).
HEADER_BYTES = 64
# A segment above this is given back once a message needs less than a quarter of it.
KEPT_BYTES = 256 << 20
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class Segment:
    """One direction of traffic: one process writes, others read."""

    def __init__(self, descriptor: int | None = None):
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, mmap.PAGESIZE)
        self._map = mmap.mmap(self.descriptor, mmap.PAGESIZE)

    def write(self, tensors: list[torch.Tensor], base: int = HEADER_BYTES) -> list[dict[str, Any]]:
        """Lay the tensors (any device) into the segment from `base` on; the result goes into the head."""
        entries, offset = [], base
        for tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append({"dtype": dtype, "shape": list(tensor.shape), "offset": offset})
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._reserve(offset)
        for tensor, entry in zip(tensors, entries, strict=True):
            if tensor.numel():
                self._view(entry).copy_(tensor)
        return entries

    def read(self, entries: list[dict[str, Any]], device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """Copy the tensors out, straight to `device`."""
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
        """Close the file; the memory goes when the last map and view are gone."""
        os.close(self.descriptor)

    def _read_one(self, entry: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        if 0 in entry["shape"]:
            return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device=device)
        return self._view(entry).to(device, copy=True)

    def _view(self, entry: dict[str, Any]) -> torch.Tensor:
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        count = 1
        for n in shape:
            count *= n
        end = entry["offset"] + count * dtype.itemsize
        if len(self._map) < end:
            self._remap(end)
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


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("comfy_xdit", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
