"""Whether a plan is right on the ComfyUI at hand: a tiny model of the class, one rank against all.

A version can keep every name and still change what happens between the blocks, and then the picture is wrong
in silence. So a class is spread only where tiny models of it were, exactly, with every kind of call; and
where leaving out what other ranks' keys say made a difference.
"""

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

from worker.models.comfyui.cases import CASES
from worker.models.comfyui.draw import Case, Draw
from worker.models.comfyui.spreading import Spread
from worker.models.comfyui.tiny import Size
from worker.parallel import Mesh, PlanMismatch

SAME, OTHER = 1e-5, 1e-4  # relative L2: at most, and at least once ranks are deaf
# What a class raises where something does not fit it.
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, PlanMismatch)
_proven: dict[tuple[str, int, int], str] = {}  # class and degrees: why not, or nothing


def prove(name: str, mesh: Mesh, device: torch.device) -> None:
    """Compare tiny models of a class, once in a process. All ranks of the mesh call it alike.

    Raises:
        PlanMismatch: its plan is not right for this ComfyUI's class, or there is no tiny model of it.
    """
    key = (name, mesh.ulysses, mesh.ring)
    if key not in _proven:
        _proven[key] = _why_not(name, mesh, device)
    if _proven[key]:
        raise PlanMismatch(f"its plan is not right for this ComfyUI's {name} ({_proven[key]})")


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


def _why_not(name: str, mesh: Mesh, device: torch.device) -> str:
    compared = 0
    for kind, case in CASES.items():
        if case.name != name:
            continue
        try:
            model, _ = tiny_model(case, device)
            wanted = _call(model, case, device)
        except FAILURES:
            continue  # of no such variant, or one that this ComfyUI itself cannot compute
        try:
            error = _difference(model, case, mesh, device, wanted, deaf=False)
            deaf = _difference(model, case, mesh, device, wanted, deaf=True)
        except FAILURES as failure:
            return f"{kind}: {failure}"
        compared += 1
        if not error <= SAME or not deaf >= OTHER:
            return f"{kind}: off by {error:.0e}, and by {deaf:.0e} without other ranks' keys"
    return "" if compared else "there is no tiny model to prove it on"


def _difference(
    model: nn.Module, case: Case, mesh: Mesh, device: torch.device, wanted: list[torch.Tensor], deaf: bool
) -> float:
    spread = Spread(model, mesh, deaf=deaf)
    try:
        got = _call(model, case, device, spread)
    finally:
        spread.close()
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))


def _call(
    model: nn.Module, case: Case, device: torch.device, spread: Spread | None = None
) -> list[torch.Tensor]:
    args, kwargs = _to(case.call(Draw(case.batches[0])), device)
    if spread is not None and "control" in kwargs:
        kwargs["control"] = spread.residuals(kwargs["control"])
    sigmas = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    return case.outputs(model, *args, **kwargs, transformer_options=_to(sigmas, device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return type(value)(_to(part, device) for part in value) if isinstance(value, (list, tuple)) else value
