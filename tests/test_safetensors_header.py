"""The one reader of safetensors headers: what it reads, and every way a file can be none."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfy_xdit.protocol import safetensors_header
from comfy_xdit.protocol.controlnet_files import kind_at
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.safetensors_header import read_header
from tests.header_files import header_of, write_raw, write_sparse
from worker.checkpoints import Checkpoint
from worker.vae import files as vae_files

SECONDS = 2.0  # in which any file is read or refused
READERS = {
    "header": read_header,
    "checkpoint": Checkpoint.at,
    "vae": vae_files.find,
    "controlnet": lambda path: kind_at(path, path.name),
}
MANY = 1_000_000
SAVED = {
    name: torch.zeros(2, 3, dtype=getattr(torch, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
        "float4_e2m1fn_x2", "complex64", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
        "uint8", "bool",
    )
}  # fmt: skip


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    file = tmp_path / "all.safetensors"
    save_file({**SAVED, "scalar": torch.ones(()), "empty": torch.ones(0, 4)}, file, {"about": "{tests}"})
    found = read_header(file)
    raw = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        assert set(found) == set(opened.keys())
        for name, tensor in found.items():
            part = opened.get_slice(name)
            assert (tensor.dtype, tensor.shape) == (part.get_dtype(), tuple(part.get_shape()))
    assert found["scalar"].shape == () and found["empty"].shape == (0, 4)
    stored = raw[found["scalar"].start : found["scalar"].stop]
    assert torch.frombuffer(bytearray(stored), dtype=torch.float32).item() == 1.0


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def raw(text: bytes, data: int = 0, length: int | None = None):
    return lambda file: write_raw(file, text, data, length)


def of(header, data: int = 8):
    return raw(json.dumps(header).encode(), data)


def _directory(file: Path) -> None:
    file.mkdir()


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(file))


HOSTILE = {
    "empty": (lambda file: file.write_bytes(b""), "ends within its header"),
    "seven bytes": (lambda file: file.write_bytes(b"\1" * 7), "ends within its header"),
    "header longer than the file": (raw(b"{}", length=99), "ends within its header"),
    "2^64 - 1 bytes of header": (raw(b"{}", length=(1 << 64) - 1), "ends within its header"),
    "no object": (raw(b"[]"), "no JSON object"),
    "no JSON": (raw(b"{nothing"), "damaged or not a safetensors file"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "damaged or not a safetensors file"),
    "nested": (raw(b'{"a":' * 200_000), "nested without end"),
    "nested lists": (raw(b'{"a":' + b"[" * 90_000), "nested without end"),
    "a long number": (raw(b'{"a":' + b"9" * 5_000_000 + b"}"), "number of 5000000 digits"),
    "a negative number": (of({"a": entry(shape=[-1])}), "the number -1"),
    "a fraction": (of({"a": entry(shape=[2.0])}), "only whole numbers"),
    "infinity": (raw(b'{"a": Infinity}'), "only whole numbers"),
    "two of a name": (raw(b'{"a":{"dtype":"F32","shape":[]},"a":[]}'), "stands in its header twice"),
    "two of a field": (raw(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "stands in its header twice"),
    "no tensor": (of({"a": [1]}), "a is no tensor"),
    "unknown dtype": (of({"a": entry(dtype="F7")}), "dtype 'F7', which safetensors does not know"),
    "dtype no text": (of({"a": entry(dtype=["F32"])}), "dtype"),
    "shape no list": (of({"a": entry(shape=2)}), "shape 2, which no tensor has"),
    "shape of booleans": (of({"a": entry(shape=[True])}), "shape"),
    "too many dimensions": (of({"a": entry(shape=[1] * 17, data_offsets=[0, 4])}, 4), "which no tensor has"),
    "empty and endless": (of({"a": entry(shape=[0, 10**12], data_offsets=[0, 0])}, 0), "which no tensor has"),
    "three offsets": (of({"a": entry(data_offsets=[0, 8, 9])}), "is no place"),
    "backwards": (of({"a": entry(data_offsets=[8, 0])}), "is no place"),
    "wrong size": (of({"a": entry(shape=[3])}), r"a, F32 of shape \(3,\), does not have 8 bytes"),
    "truncated": (of({"a": entry()}, 7), "its tensors take"),
    "bytes behind": (of({"a": entry()}, 9), "its tensors take"),
    "a gap": (of({"a": entry(), "b": entry(data_offsets=[9, 17])}, 17), "b does not begin where"),
    "an overlap": (of({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12), "b does not begin where"),
    "a name of lines": (of({"a\nb": entry()}), "which no model has"),
    "half a surrogate": (raw(b'{"\\ud800":{"dtype":"U8","shape":[]}}'), "which no model has"),
    "an endless name": (of({"a" * 2000: entry()}), "which no model has"),
    "metadata no text": (of({"__metadata__": {"a": 1}}, 0), "something else than text"),
    "metadata that is a list": (of({"__metadata__": []}, 0), "something else than text"),
    "16 MiB of lists": (raw(b'{"a":[' + b"[]," * 5_500_000 + b"0]}"), "more than 100,000 lists"),
    "many lists": (raw(b'{"a":[' + b"[]," * 90_000 + b"0]}"), "a is no tensor"),
    "16 MiB of numbers": (raw(b'{"a":[' + b"0," * 8_000_000 + b"0]}"), "more than 500,000 numbers"),
    "16 MiB of objects": (raw(b"{" + b'"b":{},' * 2_000_000 + b'"a":{}}'), "more than 50,000 tensors"),
    "pickle": (lambda file: file.write_bytes(b"\x80\x04."), "damaged or not a safetensors file"),
}  # fmt: skip
NO_FILES = {
    "fifo": (os.mkfifo, "is a FIFO; choose a safetensors file"),
    "socket": (_socket, "cannot be read"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is a device; choose a safetensors file"),
    "dangling link": (lambda file: file.symlink_to("nowhere"), "cannot be read: No such file"),
    "missing": (lambda file: None, "cannot be read: No such file"),
}


def refused(reader, path: Path, words: str) -> None:
    began = time.process_time(), time.monotonic()
    with pytest.raises(InvalidInput, match=words) as caught:
        reader(path)
    assert path.name in str(caught.value) and len(str(caught.value)) < 1000
    # The machine may be shared: the processor's time, unless it waited.
    assert min(time.process_time() - began[0], time.monotonic() - began[1]) < SECONDS
    assert time.monotonic() - began[1] < 10 * SECONDS


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused_by_name_at_once(what, tmp_path):
    make, words = HOSTILE[what]
    file = tmp_path / "bad.safetensors"
    make(file)
    refused(read_header, file, words)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_regular_file_is_refused_without_waiting(what, reader, tmp_path):
    make, words = NO_FILES[what]
    make(tmp_path / "bad.safetensors")
    refused(READERS[reader], tmp_path / "bad.safetensors", words)


def test_a_folder_is_no_file(tmp_path):
    refused(read_header, tmp_path, "is a folder; choose a safetensors file")
    inside = tmp_path / "model"
    (inside / "weights.safetensors").mkdir(parents=True)
    refused(READERS["checkpoint"], inside, "is a folder; choose a safetensors file")
    refused(READERS["controlnet"], inside, "is a folder; choose a safetensors file")


@pytest.mark.parametrize("reader", READERS)
def test_a_million_tensors_are_refused_at_once_with_the_limit(reader, tmp_path):
    parts = (f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(MANY))
    file = write_raw(tmp_path / "many.safetensors", b"{" + ",".join(parts).encode() + b"}", MANY)
    refused(READERS[reader], file, r"at most 16,777,216 are read, with at most 50,000 tensors; choose a file")


def test_the_most_tensors_are_read_in_time_and_one_more_is_refused(tmp_path):
    most = safetensors_header.MAX_TENSORS
    tensors = {f"blocks.{i}.weight": ("F16", (1, 1)) for i in range(most)}
    file = write_sparse(tmp_path / "many.safetensors", header_of(tensors))
    began = time.process_time()
    assert len(read_header(file)) == most
    assert time.process_time() - began < SECONDS
    write_sparse(file, header_of({**tensors, "one.more": ("F16", (1,))}))
    refused(read_header, file, r"has 50,001 tensors, at most 50,000 are read; choose")


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    file = tmp_path / ("a" * 300 + ".safetensors")
    with pytest.raises(InvalidInput, match="cannot be read: File name too long; choose a safetensors file"):
        read_header(file)
    with pytest.raises(InvalidInput, match="cannot be read: embedded null byte; choose a safetensors file"):
        read_header(tmp_path / "a\0b.safetensors")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    """Which of the two the model has is nobody's guess."""
    both = {"model.diffusion_model.x": ("F16", (1,)), "diffusion_model.x": ("F16", (1,))}
    file = write_sparse(tmp_path / "both.safetensors", header_of(both))
    refused(Checkpoint.at, file, "both.safetensors has the tensor x twice, as model.diffusion_model.x and as")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        write_sparse(folder / f"{name}.safetensors", header_of({"x": ("F16", (1,))}))
    refused(Checkpoint.at, folder, "the tensor x twice, in a.safetensors and in b.safetensors; remove")
