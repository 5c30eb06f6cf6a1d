"""safetensors files written by hand: any header, and no byte of any weight (the files are sparse)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
Header = dict[str, Any]


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Header:
    """The header of tensors that lie one after the other; dtype and shape by name."""
    header: Header = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header


def write_sparse(file: Path, header: Header) -> Path:
    """A file with this header, of the size it speaks of."""
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return write_raw(file, json.dumps(header).encode(), end)


def write_raw(file: Path, text: bytes, data: int = 0, length: int | None = None) -> Path:
    """A file with this text for a header (`length` is what it says of it), and so many bytes behind."""
    start = (len(text) if length is None else length).to_bytes(8, "little")
    file.write_bytes(start + text)
    os.truncate(file, 8 + len(text) + data)
    return file
