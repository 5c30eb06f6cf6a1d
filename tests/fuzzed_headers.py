"""Mutated safetensors headers, and the readers that they go through."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open

from comfy_xdit.protocol.controlnet_files import kind_at
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.safetensors_header import BITS, read_header
from comfy_xdit.protocol.spec import ControlNet, IPAdapterFile, LoraFile, ModelSpec
from tests import controlnets, ip_adapter_files, lora_files, vaes
from tests.header_files import header_of, write_raw
from worker.parallel.groups import Degrees, RankGroups
from worker.patches.lora_files import LoraFiles
from worker.transformer.controlnets import FittedControlNet
from worker.transformer.ip_adapters import IPAdapters
from worker.transformer.transformer import Transformer

SECONDS = 10.0  # of a processor, the most that one may take; the first one imports a library
MOST_TEXT = 3000  # characters of an error
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

# ---------------------------------------------------------------------- any header

names = st.text(max_size=12) | st.sampled_from(["a", "b.weight", "__metadata__", "a.bias"])
numbers = st.integers(-3, 40) | st.integers(-(2**70), 2**70) | st.booleans() | st.floats()
plain = st.recursive(
    st.none() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BITS, "F7", ""]) | plain,
        "shape": st.lists(numbers, max_size=5) | plain,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | plain,
    },
)
headers = st.dictionaries(names, entries | plain, max_size=5)
good = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
).map(lambda tensors: header_of({f"t{i}": (dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)}))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file: a good header with a value replaced, or its bytes changed; or anything at all."""
    header: Any = draw(good)
    for _ in range(draw(st.integers(0, 2))):
        if not header:
            break
        where = draw(st.sampled_from(sorted(header)))
        change = draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole", "gone", "again"]))
        if change == "gone":
            del header[where]
        elif change == "again":
            header[draw(names)] = header[where]
        elif change == "whole" or not isinstance(header[where], dict):
            header[where] = draw(entries | plain)
        else:
            header[where] = header[where] | {change: draw(entries.map(lambda e: e.get("shape", 0)) | plain)}
    text = json.dumps(draw(st.just(header) | headers)).encode()
    ends = [e["data_offsets"][1] for e in header.values() if _has_end(e)] if isinstance(header, dict) else []
    data = min(max(ends, default=0), 10_000) if all(end >= 0 for end in ends) else 0
    file = bytearray(len(text).to_bytes(8, "little") + text + bytes(data))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(file)))
        stop = min(len(file), at + draw(st.integers(0, 8)))
        file[at:stop] = draw(st.binary(max_size=8))
    return bytes(file)


def _has_end(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int


def answer(reader: Callable[[Path], Any], path: Path) -> Any:
    """What the reader says, or None when it refuses by InvalidInput.

    Raises:
        AssertionError: it took too long, or refuses without a word.
    """
    began = time.process_time()
    try:
        return reader(path)
    except InvalidInput as error:
        assert 0 < len(str(error)) < MOST_TEXT
        return None
    finally:
        assert time.process_time() - began < SECONDS


def check_bytes(file: Path, content: bytes) -> None:
    """What our reader takes, safetensors takes as well, and finds the same."""
    file.write_bytes(content)
    answer(lambda path: kind_at(path, path.name), file)
    found = answer(read_header, file)
    if found is None:
        return
    with safe_open(file, framework="pt") as opened:
        assert found.keys() == set(opened.keys())
        for name, tensor in found.items():
            part = opened.get_slice(name)
            assert (tensor.dtype, tensor.shape) == (part.get_dtype(), tuple(part.get_shape()))
            assert 8 <= tensor.start <= tensor.stop <= len(content)


# ---------------------------------------------------------------------- headers of models


@dataclass(frozen=True)
class Alone:
    """The end of a rank that has no other."""

    rank: int = 0
    world_size: int = 1


ONE = Degrees(branches=1, ulysses=1, ring=1, stages=1)
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def readers(models: dict[str, Any], root: Path) -> dict[str, tuple[Callable[[Path], Any], Shapes]]:
    """Each reader of model files in the ranks, with the tensors of a file that it takes.

    Args:
        models: tiny ones, by name.
        root: an empty folder.
    """
    # Its imports look for torchvision, which the shim of the tests in ComfyUI mends when they run.
    from worker.vae.vae import VAE

    groups = RankGroups(Alone(), ONE, torch.device("cpu"))
    nets = controlnets.write_nets(root)
    result: dict[str, Any] = {}

    def add(what: str, read: Any, tensors: dict[str, Any]) -> None:
        result[what] = (read, {n: (DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items()})

    for name, model in models.items():
        stored = {n: (t.dtype, t.shape) for n, t in read_header(model.file).items()}
        result[name] = (lambda path: Transformer(ModelSpec.of(path, "transformer"), groups, ONE), stored)
    for name, net in nets.items():
        model = Transformer(ModelSpec.of(models[net.model].file, "transformer"), groups, ONE)
        add(
            f"controlnet {name}",
            lambda path, model=model: FittedControlNet(ControlNet.of(path), model, groups),
            controlnets.tensors(net.module),
        )
    for name, names_of in (("AutoencoderKL", vaes.ldm_names), ("AutoencoderKLWan", vaes.wan_names)):
        config = vaes.WAN_2_1 if name.endswith("Wan") else None
        tensors = names_of(vaes.build(name, config))
        add(f"vae {name}", lambda path: VAE(ModelSpec.of(path, "vae"), groups), tensors)
    for model in {model.family.name: model for model in models.values()}.values():
        family = model.family
        shapes = {n: t.shape for n, t in read_header(model.file).items()}
        config = family.config(shapes)
        loras = LoraFiles.of(family, config, shapes)
        written, _ = lora_files.write(model, lora_files.NAMINGS["comfyui"], seed=1)
        add(f"lora {family.name}", lambda path, f=loras: f.check(LoraFile.of(path)), written)
        adapters = IPAdapters(family, config, torch.float32, torch.device("cpu"))
        add(
            f"ip-adapter {family.name}",
            lambda path, a=adapters: a.missing_bytes([IPAdapterFile.of(path)]),
            ip_adapter_files.tensors_for(model, 1),
        )
    return result


sizes = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 65, 128, 256, 1536, 20_000])


@st.composite
def changed(draw: st.DrawFn, shapes: Shapes) -> Shapes:
    """The tensors of a model, some of them gone, renamed, renumbered, or of another shape or dtype."""
    result = dict(shapes)
    for _ in range(draw(st.integers(1, 3))):
        if not result:
            break
        name = draw(st.sampled_from(sorted(result)))
        dtype, shape = result[name]
        how = draw(st.sampled_from(["gone", "shape", "dims", "dtype", "number", "word", "prefix", "few"]))
        if how == "gone":
            del result[name]
        elif how == "shape" and shape:
            at = draw(st.integers(0, len(shape) - 1))
            result[name] = dtype, (*shape[:at], draw(sizes), *shape[at + 1 :])
        elif how == "dims":
            result[name] = dtype, tuple(draw(st.lists(sizes, max_size=5)))
        elif how == "dtype":
            result[name] = draw(st.sampled_from(["I64", "BOOL", "F8_E4M3", "F64", "U8"])), shape
        elif how == "number":
            number = draw(st.sampled_from(["7", "199", "200", "999999999", "9" * 30, "٣", "-1", "x"]))
            words = [number if word.isdigit() and draw(st.booleans()) else word for word in name.split(".")]
            result[".".join(words)] = result.pop(name)
        elif how == "word":
            words = name.split(".")
            words[draw(st.integers(0, len(words) - 1))] = draw(
                st.sampled_from(["", "weight", "bias", "attn"])
            )
            result[".".join(words)] = result.pop(name)
        elif how == "prefix":
            result[draw(st.sampled_from(["model.diffusion_model.", "vae.", "x."])) + name] = result.pop(name)
        elif how == "few":
            result = {n: result[n] for n in sorted(result)[: draw(st.integers(1, 10))]}
    return result


def check_model(file: Path, read: Callable[[Path], Any], tensors: Shapes) -> None:
    """A file with these tensors is read, or refused.

    Weights are zeros in a sparse file; one larger than any disk has is refused by the file's size.
    """
    header = header_of(tensors)
    end = max((e["data_offsets"][1] for e in header.values()), default=0)
    write_raw(file, json.dumps(header).encode(), min(end, 1 << 40))
    answer(read, file)
