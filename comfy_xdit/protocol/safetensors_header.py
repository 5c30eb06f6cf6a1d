"""The header of a safetensors file: which tensors are where. Strict, limited, and read by this module alone.

A file may come from anywhere, so whatever is wrong with it is a sentence that names it, soon: nothing
is waited for (a FIFO), nothing large is read before its size is known, and no weight is read at all.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput, shown
from comfy_xdit.protocol.regular_files import open_regular

MAX_HEADER_BYTES = 16 << 20  # the largest published ones have a few MiB
MAX_TENSORS = 50_000  # a file of one model has hundreds, one with many experts some ten thousand
MAX_NAME = 1_000  # characters
MAX_DIMS = 16
MAX_DIGITS = 19  # of an integer: 64 bits
MAX_INTEGERS = 10 * MAX_TENSORS  # sizes and places
MAX_NOTED = 2 * MAX_TENSORS  # brackets beside two of each tensor: in what trainers note in __metadata__
MAX_EMPTY = 1 << 24  # product of the other sizes of a tensor that has no element: no file bounds it
SUFFIXES = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".pkl", ".bin")
# Bits of an element by dtype, all that safetensors 0.8 knows.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype in safetensors' spelling, and its bytes from `start` to `stop` of it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the header's order.

    Raises:
        InvalidInput: there is no such file, it is a pickle or no regular file, its header is damaged,
            is not the one of these bytes, or is beyond the limits.
    """
    refuse_pickle(file)
    with open_regular(file, "a safetensors file") as (stream, size):
        start = stream.read(8)
        if start.startswith(b"GGUF"):
            raise InvalidInput(
                f"{file.name} is a GGUF file, which is read as a diffusion model in ComfyUI alone (by 'xDiT "
                "Load Diffusion Model', named .gguf); choose a safetensors file here."
            )
        try:
            length = _length(start, size)
            if length > MAX_HEADER_BYTES:
                raise InvalidInput(
                    f"{file.name} has a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read, "
                    f"with at most {MAX_TENSORS:,} tensors; choose a file of one model without others' data."
                )
            text = stream.read(length)
            if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
                raise InvalidInput(
                    f"{file.name} has {count:,} tensors, at most {MAX_TENSORS:,} are read; choose a file of "
                    "one model, or a folder of several files."
                )
            entries = _entries(text, 2 * count + MAX_NOTED)
            tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items()}
            _check_places(tensors, 8 + length, size)
        except ValueError as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{file.name} ({size} bytes) is damaged or not a safetensors file: {error}; "
                "download it again."
            ) from error
    return tensors


def check_suffix(file: Path) -> None:
    """Raise InvalidInput for a file whose name says that it is of another format."""
    refuse_pickle(file)
    if file.suffix.lower() not in SUFFIXES:
        raise InvalidInput(
            f"{file.name} is no safetensors file by its name; choose one that ends in {', '.join(SUFFIXES)}."
        )


def refuse_pickle(file: Path) -> None:
    """Raise InvalidInput for a file whose name says that it is a pickle."""
    if file.suffix.lower() in PICKLES:
        raise InvalidInput(f"{file.name} is a pickle file, which can run code; {how_to_convert()}")


def how_to_convert() -> str:
    """What to do with a pickle."""
    return (
        "convert it on a machine you trust: "
        "torch.load(file, weights_only=True), then safetensors.torch.save_file(state_dict, new_file)"
    )


def _length(start: bytes, size: int) -> int:
    """Bytes of the header, from the 8 bytes before it."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("it ends within its header")
    return length


def _entries(text: bytes, lists: int) -> dict[str, Any]:
    """The header's JSON, of at most so many lists, without what it says about the file as a whole."""
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    if text.count(b"[") > lists:
        raise ValueError(f"its header has more than {lists:,} lists, the most that are read")
    limits = _Limits()
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=limits.object,
            parse_int=limits.integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("its header is nested without end") from None
    about = header.pop("__metadata__", None)
    if about is not None and not (isinstance(about, dict) and all(map(_is_text, about.values()))):
        raise ValueError("its __metadata__ holds something else than text")
    return header


class _Limits:
    """What JSON's reader asks for each object and integer, so that too many end it at once."""

    def __init__(self) -> None:
        self._objects = MAX_TENSORS + 2  # the header itself, and its __metadata__
        self._integers = MAX_INTEGERS

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._objects -= 1
        if self._objects < 0 or len(pairs) > MAX_TENSORS + 1:
            raise ValueError(f"it has more than {MAX_TENSORS:,} tensors, the most that are read")
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{shown(name)} stands in its header twice")
            found[name] = value
        return found

    def integer(self, digits: str) -> int:
        self._integers -= 1
        if self._integers < 0:
            raise ValueError(f"its header has more than {MAX_INTEGERS:,} numbers, the most that are read")
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"its header has a number of {len(digits)} digits")
        if not digits.isdigit():
            raise ValueError(f"its header has the number {digits}")
        return int(digits)


def _no_number(text: str) -> None:
    raise ValueError(f"{shown(text)} is in its header, where only whole numbers are")


def _tensor(name: str, entry: Any, data: int) -> StoredTensor:
    """A tensor as its header's `entry` tells it; `data` is where the bytes of all tensors begin."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"a tensor is called {shown(name)}, which no model has")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no tensor in its header")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has the dtype {shown(dtype)}, which safetensors does not know")
    if not _is_sizes(shape) or not _fits(shape):
        raise ValueError(f"{name} has the shape {shown(shape)}, which no tensor has")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} lies at {shown(offsets)}, which is no place")
    start, stop = offsets
    if math.prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise ValueError(f"{name}, {dtype} of shape {tuple(shape)}, does not have {stop - start} bytes")
    return StoredTensor(dtype, tuple(shape), data + start, data + stop)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _fits(shape: list[int]) -> bool:
    """Whether a tensor may have this shape; its elements must fit the file besides."""
    return len(shape) <= MAX_DIMS and (0 not in shape or math.prod(n or 1 for n in shape) <= MAX_EMPTY)


def _check_places(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Raise ValueError unless the tensors fill the file: no gap, no overlap, nothing behind."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end = tensor.stop
    if end != size:
        raise ValueError(f"its tensors take {end} bytes")
