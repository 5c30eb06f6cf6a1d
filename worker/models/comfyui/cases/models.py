"""Tiny models of ComfyUI's classes with random weights, as far as the ComfyUI at hand knows them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import comfy.ops
import torch
from torch import nn

from worker.models.comfyui.cases.draw import Case, Draw
from worker.models.comfyui.cases.sizes import Size


def tiny_model(case: Case, device: torch.device) -> tuple[nn.Module, Size]:
    """A model of a case with random weights, every one of them, in fp32; and the size this version knows.

    Raises:
        TypeError, ImportError, AttributeError: this ComfyUI has no such class, or no such variant.
    """
    module = importlib.import_module(f"comfy.ldm.{case.module}")
    made = getattr(module, case.name)
    size = _known(made, case.size)
    build = made if case.build is None else partial(case.build, made)
    with _told(module, case.parts):
        model = build(**size, device=device, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if key.endswith("inv_freq"):  # of a file, as some are: not filled by the class, and not random
            tensor.copy_(1e4 ** -torch.linspace(0, 1, tensor.numel()).view_as(tensor))
        elif tensor.is_floating_point() and not key.endswith("freqs"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.08)
    return model.eval().requires_grad_(False), {k: v for k, v in size.items() if k != "image_model"}


def given(case: Case, draw: Draw, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a case's call, with what samplers put into its options, and classes read."""
    args, kwargs = case.call(draw)
    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    return _to((args, kwargs | {"transformer_options": options}), device)


def outputs(found: Any) -> list[torch.Tensor]:
    """All latents that a model gives."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return type(value)(_to(part, device) for part in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def _told(module: ModuleType, parts: Mapping[str, Size]) -> Iterator[None]:
    """Within, these classes of a module are built in a size that their owner does not pass on."""
    full = {name: getattr(module, name) for name in parts}
    for name, size in parts.items():
        setattr(module, name, partial(full[name], **size))
    try:
        yield
    finally:
        for name, of_name in full.items():
            setattr(module, name, of_name)


def _known(made: type, size: Size) -> Size:
    """Of a class whose sizes are a dataclass: those of this version."""
    for name, value in vars(sys.modules[made.__module__]).items():
        if name.lower() == f"{made.__name__.lower()}params" and inspect.isclass(value):
            fields = value.__dataclass_fields__
            known = {key: part for key, part in size.items() if key in fields}
            return known | ({"image_model": None} if "image_model" in fields else {})
    return size
