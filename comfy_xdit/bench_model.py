"""Writes the model that `bench` times: a FLUX.1 of another size, with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.planning.reference import TEXT_TOKENS, Reference

# Numbers of a token, of a token of a prompt, of all of a prompt, of a time.
CHANNELS, CONTEXT, POOLED, TIME = 64, 256, 256, 256
Shape = tuple[int, ...]


def write(reference: Reference, file: Path) -> None:
    """Write the safetensors file, in Black Forest Labs' names."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if reference.dtype_bytes == 4 else torch.bfloat16
    tensors = {}
    for name, shape in shapes(reference):
        scale = 0.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    save_file(tensors, file)


def prompt() -> dict[str, Any]:
    """A random one, as the transformer takes it."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return {
        "context": torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator),
        "y": torch.randn(1, POOLED, generator=generator),
    }


def shapes(reference: Reference) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor."""
    width = reference.width
    head = width // reference.heads
    for layer, out, into in (
        ("img_in", width, CHANNELS), ("txt_in", width, CONTEXT),
        ("time_in.in_layer", width, TIME), ("time_in.out_layer", width, width),
        ("vector_in.in_layer", width, POOLED), ("vector_in.out_layer", width, width),
        ("final_layer.adaLN_modulation.1", 2 * width, width), ("final_layer.linear", CHANNELS, width),
    ):  # fmt: skip
        yield from _linear(layer, out, into)
    for block in range(reference.double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            yield from _linear(f"{name}_mod.lin", 6 * width, width)
            yield from _linear(f"{name}_attn.qkv", 3 * width, width)
            yield from _linear(f"{name}_attn.proj", width, width)
            yield from _linear(f"{name}_mlp.0", 4 * width, width)
            yield from _linear(f"{name}_mlp.2", width, 4 * width)
            yield from _norms(f"{name}_attn.norm", head)
    for block in range(reference.single):
        name = f"single_blocks.{block}"
        yield from _linear(f"{name}.linear1", 7 * width, width)
        yield from _linear(f"{name}.linear2", width, 5 * width)
        yield from _linear(f"{name}.modulation.lin", 3 * width, width)
        yield from _norms(f"{name}.norm", head)


def _linear(name: str, out: int, into: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norms(name: str, head: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.query_norm.scale", (head,)
    yield f"{name}.key_norm.scale", (head,)
