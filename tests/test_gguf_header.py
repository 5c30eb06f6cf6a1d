"""The reader of GGUF headers: what it reads, and every way a file can be none."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfy_xdit.protocol import gguf_header, safetensors_header
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.gguf_header import read_header, read_numbers
from tests import gguf_files
from tests.gguf_files import gguf

SECONDS = 2.0  # in which any file is read or refused
U8, U32, STRING, ARRAY = 0, 4, 8, 9
F32, Q8_0 = 0, 8


def text(value: bytes | str, length: int | None = None) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value) if length is None else length) + value


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "a", dims: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    *tensors: bytes, fields: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, version: int = 3
) -> bytes:
    counts = counts or (len(tensors), len(fields))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*fields, *tensors))


def with_data(start: bytes, data: int = 32) -> bytes:
    return start + bytes(-len(start) % 32 + data)


def test_every_tensor_is_where_the_gguf_package_finds_it(tmp_path):
    generator, file = torch.Generator().manual_seed(0), tmp_path / "all.gguf"
    kinds = [*gguf_files.PACKED, "BF16", "F16", "F32"]
    tensors = {f"blocks.{kind}.weight": torch.randn(4, 512, generator=generator) for kind in kinds}
    tensors |= {"patch.weight": torch.randn(4, 2, 1, 2, 2, generator=generator), "bias": torch.randn(3)}
    chosen = lambda name, _: next((kind for kind in kinds if f".{kind}." in name), "F32")  # noqa: E731
    numbers = gguf_files.write(file, tensors, chosen, "wan")

    found = read_header(file)

    assert found.architecture == "wan"
    assert {name: t.shape for name, t in found.tensors.items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    for theirs in gguf.GGUFReader(file).tensors:
        ours = found.tensors[theirs.name]
        assert (ours.dtype, ours.start) == (theirs.tensor_type.name, theirs.data_offset)
        assert ours.stop - ours.start == theirs.n_bytes
    for name, wanted in numbers.items():
        assert np.array_equal(read_numbers(file, name), wanted.numpy()), name


def test_long_arrays_cost_nothing(tmp_path):
    """A language model's words and their scores; the gguf package makes objects of them, for seconds."""
    words = b"".join(text("word") for _ in range(200_000))
    fields = (
        field("tokens", ARRAY, struct.pack("<IQ", STRING, 200_000) + words),
        field("scores", ARRAY, struct.pack("<IQ", U8, 10_000_000) + bytes(10_000_000)),
        field("general.architecture", STRING, text("llama")),
    )
    file = tmp_path / "long.gguf"
    file.write_bytes(with_data(header(tensor(), fields=fields)))
    began = time.perf_counter()
    assert read_header(file).architecture == "llama"
    assert time.perf_counter() - began < SECONDS


def array(kind: int, length: int, elements: bytes = b"", key: str = "a") -> bytes:
    return field(key, ARRAY, struct.pack("<IQ", kind, length) + elements)


GOOD = with_data(header(tensor()))
MANY = 1 << 60
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "magic alone": (b"GGUF", "header is longer than the file"),
    "a safetensors file": (struct.pack("<Q", 2) + b"{}" + bytes(100), "does not begin with GGUF"),
    "version 1": (header(version=1), "is of version 1;"),
    "big-endian": (header(version=3 << 24), "written on a big-endian machine"),
    "many tensors": (header(counts=(MANY, 0)), "it says that it has 1,152,921,504,606,846,976 tensors"),
    "many fields": (header(counts=(0, MANY)), "at most 50,000 and 10,000 are read"),
    "more tensors than there are": (header(tensor(), counts=(2, 0)), "header is longer than the file"),
    "a long name": (header(text("", MANY), counts=(1, 0)), "the name of a tensor has"),
    "a name of control characters": (header(tensor("a\n")), "which no model has"),
    "a name in no encoding": (with_data(header(tensor().replace(b"a", b"\xff"))), "can't decode"),
    "a long text": (header(fields=(field("a", STRING, text("", MANY)),)), "a text has"),
    "a long array": (header(fields=(array(U8, MANY),)), "header is longer than the file"),
    "a long array of texts": (header(fields=(array(STRING, MANY),)), "header is longer than the file"),
    "texts without end": (
        with_data(header(fields=(array(STRING, 700_000),)), 8 * 700_000), "more than 600,000 texts"
    ),
    "arrays in arrays": (header(fields=(array(ARRAY, 1, bytes(99)),)), "an array is of type 9"),
    "a field of no type": (header(fields=(field("a", 99, bytes(99)),)), "a field is of type 99"),
    "a field twice": (header(fields=(field("a", U8, b"1"),) * 2), "'a' stands in its header twice"),
    "a tensor twice": (with_data(header(tensor(), tensor())), "a stands in its header twice"),
    "many dimensions": (header(tensor(dims=(1,) * 17)), "17 dimensions"),
    "more elements than numbers": (header(tensor(dims=(1 << 40, 1 << 40))), "which no tensor has"),
    "a size of zero and a large one": (header(tensor(dims=(0, 1 << 40))), "which no tensor has"),
    "no whole blocks": (header(tensor(dims=(8,), kind=Q8_0)), "is packed as Q8_0, by 32 elements of a row"),
    "a number that is packed": (header(tensor(dims=(), kind=Q8_0)), "is packed as Q8_0"),
    "an unknown type": (header(tensor(kind=999)), "GGML's type 999"),
    "beside the alignment": (with_data(header(tensor(offset=8))), "which is no multiple of 32"),
    "an alignment of 3": (
        with_data(header(tensor(), fields=(field("general.alignment", U32, struct.pack("<I", 3)),))),
        "no power of two",
    ),
    "an alignment in words": (
        with_data(header(tensor(), fields=(field("general.alignment", STRING, text("32")),))),
        "no power of two",
    ),
    "outside the file": (with_data(header(tensor(offset=1 << 40))), "after the end of the file"),
    "cut off": (GOOD[:-1], "after the end of the file: it is incomplete"),
    "overlapping": (
        with_data(header(tensor(dims=(16,)), tensor("b", offset=32)), 96), "before the tensor before it"
    ),
    "another shape of other size": (
        with_data(
            header(tensor(), fields=(array(U32, 2, struct.pack("<II", 2, 3), "comfy.gguf.orig_shape.a"),))
        ),
        "is said to be of shape",
    ),
    "another shape in words": (
        with_data(header(tensor(), fields=(field("comfy.gguf.orig_shape.a", STRING, text("8")),))),
        "is said to be of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_a_sentence_soon(tmp_path, kind):
    content, words = HOSTILE[kind]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(InvalidInput, match=words) as caught:
        read_header(file)
    assert time.perf_counter() - began < SECONDS
    assert "hostile.gguf" in str(caught.value) and len(str(caught.value)) < 500


def _fifo(file: Path) -> None:
    os.mkfifo(file)


def _long(file: Path) -> None:
    length = gguf_header.MAX_HEADER_BYTES
    start = header(fields=(field("a", ARRAY, struct.pack("<IQ", U8, length)),))
    file.write_bytes(start)
    os.truncate(file, 2 * length)


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda _: None, "cannot be read"),
    "a folder": (Path.mkdir, "is a folder"),
    "a FIFO": (_fifo, "is a FIFO"),
    "a long header": (_long, "longer than 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    make, words = OTHERS[kind]
    make(tmp_path / "none.gguf")
    with pytest.raises(InvalidInput, match=words):
        read_header(tmp_path / "none.gguf")


def test_every_other_reader_says_what_it_is(tmp_path):
    (tmp_path / "model.gguf").write_bytes(GOOD)
    assert set(read_header(tmp_path / "model.gguf").tensors) == {"a"}
    with pytest.raises(InvalidInput, match="is a GGUF file, which is read as a diffusion model in ComfyUI"):
        safetensors_header.read_header(tmp_path / "model.gguf")


EXAMPLES = int(os.environ.get("XDIT_FUZZ_EXAMPLES", "1000"))
FIELDS = (
    field("general.architecture", STRING, text("wan")),
    field("comfy.gguf.orig_shape.b", ARRAY, struct.pack("<IQ3I", U32, 3, 2, 4, 4)),
    field("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + text("two")),
)
WHOLE = with_data(
    header(tensor(), tensor("b", (32,), Q8_0, 32), tensor("c", (4, 2), 1, 96), fields=FIELDS), 128
)


@settings(
    max_examples=EXAMPLES,
    database=None,
    deadline=None,
    derandomize="XDIT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(WHOLE)),
)
def test_changed_bytes_are_read_or_refused(tmp_path, changes, length):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    file = tmp_path / "changed.gguf"
    file.write_bytes(content[: length or None])
    began = time.perf_counter()
    try:
        found = read_header(file)
    except InvalidInput:
        found = None
    assert time.perf_counter() - began < SECONDS
    if found is not None:
        assert all(t.stop <= len(content) for t in found.tensors.values())
