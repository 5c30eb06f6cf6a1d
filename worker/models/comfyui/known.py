"""The names of the weights of this ComfyUI's classes, of their tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from worker.models.comfyui.cases import CASES
from worker.models.comfyui.cases.models import tiny_model

Shapes = dict[str, tuple[int, ...]]


def shapes_of_classes() -> Iterator[tuple[str, Shapes]]:
    """Of every class and variant that this ComfyUI has, once: what it is called, and its weights."""
    told = set()
    for variant, case in CASES.items():
        try:
            module, _ = tiny_model(case, torch.device("cpu"))
        except (ImportError, AttributeError, TypeError):  # it has no such class, or no such variant
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if (case.name, frozenset(shapes)) not in told:
            told.add((case.name, frozenset(shapes)))
            yield f"ComfyUI's {case.name} ({variant})", shapes
