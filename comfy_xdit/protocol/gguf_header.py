"""The header of a GGUF file: which tensors are where, and how they are packed. Strict and limited.

The `gguf` package knows the types; its reader is not used on files that come from anywhere: it makes an
object of every element of an array, however long, and believes what a header says of its own length.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.regular_files import open_regular
from comfy_xdit.protocol.safetensors_header import MAX_DIMS, MAX_EMPTY, MAX_NAME, MAX_TENSORS, StoredTensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 16 << 20  # a language model's words take most of it; a diffusion model has none
MAX_FIELDS = 10_000
MAX_STRINGS = 600_000  # of all arrays together
MAX_ALIGNMENT = 1 << 16
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # before the name of a tensor that is stored in another shape
_ALIGNMENT = 32  # where a file says nothing
# The types of a value by their numbers, as struct reads them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_INTEGERS = "BbHhIiQq"
_MOST_KEPT = MAX_DIMS  # elements of an array; longer ones are of no use here


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says of itself.

    Args:
        fields: its numbers, texts and short arrays of numbers, by key.
        tensors: by name, in the header's order; their dtypes are GGML's types, their shapes those of the
            model, outermost dimension first.
    """

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """What kind of model it says it holds; "" where it does not."""
        said = self.fields.get("general.architecture", "")
        return said if isinstance(said, str) else ""


def is_gguf(path: Path) -> bool:
    """Whether a file is to be read as GGUF."""
    return path.suffix.lower() == SUFFIX


def read_header(file: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Raises:
        InvalidInput: there is no such file, it is no regular file, its header is damaged, is not the one
            of these bytes, or is beyond the limits; or the `gguf` package is missing.
    """
    types = _types(file)
    with open_regular(file, "a GGUF file") as (stream, size):
        try:
            return _header(_Bytes(stream, size), size, types)
        except ValueError as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{file.name} ({size} bytes) is damaged or not a GGUF file: {error}; download it again."
            ) from error


def read_numbers(file: Path, name: str) -> np.ndarray:
    """A tensor of a GGUF file, unpacked, fp32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = read_header(file).tensors[name]
    stored = np.fromfile(file, np.uint8, tensor.stop - tensor.start, offset=tensor.start)
    numbers = dequantize(stored, GGMLQuantizationType[tensor.dtype])
    return numbers.astype(np.float32, copy=False).reshape(tensor.shape)


def _types(file: Path) -> dict[int, tuple[str, int, int]]:
    try:
        return _known_types()
    except ImportError as error:
        raise InvalidInput(
            f"{file.name} is read with the package gguf, which is not installed in this Python: "
            "pip install gguf"
        ) from error


@cache
def _known_types() -> dict[int, tuple[str, int, int]]:
    """By GGML's number: name, elements of a block, bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType if t in GGML_QUANT_SIZES}


class _Bytes:
    """The header's bytes, one value after the other."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._most = stream, min(size, MAX_HEADER_BYTES)
        self._cut_off = size > MAX_HEADER_BYTES
        self.place = 0

    def take(self, count: int) -> bytes:
        """So many of them."""
        self.check(count)
        self.place += count
        taken = self._stream.read(count)
        if len(taken) < count:
            raise ValueError("it ends within its header")
        return taken

    def skip(self, count: int) -> None:
        """Pass over so many."""
        self.check(count)
        self.place += count
        self._stream.seek(count, 1)

    def check(self, count: int) -> None:
        """Raise ValueError where fewer are left."""
        if self.place + count > self._most:
            limit = f"is longer than {MAX_HEADER_BYTES:,} bytes, the most that are read"
            raise ValueError(f"its header {limit if self._cut_off else 'is longer than the file'}")

    def value(self, code: str) -> Any:
        """A number, as struct calls its type."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, most: int, what: str) -> str:
        """A string of at most so many bytes."""
        length = self.value("Q")
        if length > most:
            raise ValueError(f"{what} has {length:,} characters, the most are {most:,}")
        return self.take(length).decode()


def _header(source: _Bytes, size: int, types: dict[int, tuple[str, int, int]]) -> GGUFHeader:
    if source.take(min(size, 4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = source.value("I")
    if version not in VERSIONS:
        kind = " (written on a big-endian machine)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"it is of version {version}{kind}; versions 2 and 3 are read")
    tensor_count, field_count = source.value("Q"), source.value("Q")
    if tensor_count > MAX_TENSORS or field_count > MAX_FIELDS:
        raise ValueError(
            f"it says that it has {tensor_count:,} tensors and {field_count:,} fields; at most "
            f"{MAX_TENSORS:,} and {MAX_FIELDS:,} are read"
        )
    fields = _fields(source, field_count)
    found = [_tensor(source, types) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"its tensors are aligned to {alignment!r} bytes, no power of two from 8 on")
    data = -(-source.place // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, offset, count in found:
        if name in tensors:
            raise ValueError(f"{name} stands in its header twice")
        if offset % alignment:
            raise ValueError(f"{name} lies at {offset}, which is no multiple of {alignment}")
        shape = _original_shape(name, shape, fields)
        tensors[name] = StoredTensor(dtype, shape, data + offset, data + offset + count)
    _check_places(tensors, size)
    return GGUFHeader(fields, tensors)


def _fields(source: _Bytes, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    strings = _Countdown(MAX_STRINGS)
    for _ in range(count):
        key, kind = source.text(MAX_NAME, "a key"), source.value("I")
        if key in fields:
            raise ValueError(f"the field {key!a} stands in its header twice")
        fields[key] = _field(source, kind, strings.one)
    return fields


class _Countdown:
    def __init__(self, left: int):
        self._left = left

    def one(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"its header has more than {MAX_STRINGS:,} texts, the most that are read")


def _field(source: _Bytes, kind: int, count_string: Callable[[], None]) -> Any:
    """A value; None of an array that is not kept."""
    if kind in _SCALARS:
        return source.value(_SCALARS[kind])
    if kind == _STRING:
        return source.text(MAX_HEADER_BYTES, "a text")
    if kind != _ARRAY:
        raise ValueError(f"a field is of type {kind}, which GGUF does not know")
    inner, length = source.value("I"), source.value("Q")
    if inner == _STRING:
        source.check(8 * length)
        for _ in range(length):
            count_string()
            source.skip(source.value("Q"))
        return None
    if inner not in _SCALARS:
        raise ValueError(f"an array is of type {inner}, which is not read")
    code = _SCALARS[inner]
    if length > _MOST_KEPT or code not in _INTEGERS:
        source.skip(length * struct.calcsize(f"<{code}"))
        return None
    return tuple(source.value(code) for _ in range(length))


def _tensor(
    source: _Bytes, types: dict[int, tuple[str, int, int]]
) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape (outermost first), place among the data and bytes of the next tensor."""
    name = source.text(MAX_NAME, "the name of a tensor")
    if not name.isprintable():
        raise ValueError(f"a tensor is called {ascii(name)[:60]}, which no model has")
    dims = source.value("I")
    if dims > MAX_DIMS:
        raise ValueError(f"{name} has {dims} dimensions, the most are {MAX_DIMS}")
    shape = tuple(reversed([source.value("Q") for _ in range(dims)]))
    number, offset = source.value("I"), source.value("Q")
    if number not in types:
        raise ValueError(f"{name} is of GGML's type {number}, which this version of gguf does not know")
    dtype, block, block_bytes = types[number]
    elements = math.prod(shape)
    if (0 in shape and math.prod(n or 1 for n in shape) > MAX_EMPTY) or elements >= 1 << 63:
        raise ValueError(f"{name} has the shape {shape}, which no tensor has")
    if block > 1 and (not shape or shape[-1] % block):
        raise ValueError(f"{name} of shape {shape} is packed as {dtype}, by {block} elements of a row")
    return name, dtype, shape, offset, elements // block * block_bytes


def _original_shape(name: str, stored: tuple[int, ...], fields: dict[str, Any]) -> tuple[int, ...]:
    """Of a tensor in the model, where the file says that it is stored in another one."""
    said = fields.get(f"{ORIGINAL_SHAPE}{name}")
    if said is None:
        return stored
    if not isinstance(said, tuple) or any(n < 0 for n in said) or math.prod(said) != math.prod(stored):
        raise ValueError(f"{name} of shape {stored} is said to be of shape {said!r} in the model")
    return said


def _check_places(tensors: dict[str, StoredTensor], size: int) -> None:
    """Raise ValueError for tensors that overlap, or lie outside the file."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start < end:
            raise ValueError(f"{name} begins before the tensor before it ends")
        end = tensor.stop
    if end > size:
        raise ValueError(f"its tensors end at byte {end:,}, after the end of the file: it is incomplete")
