"""Which known models a file looks like: by the names of its tensors, with `*` for the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.model_files import stored_tensors
from comfy_xdit.protocol.quantised import MARKS
from comfy_xdit.protocol.spec import HostComfyUI
from worker.models.base import ModelFamily
from worker.models.comfyui.installation import import_comfyui

MOST = 3
LEAST = 0.05  # of the names of both, the share that both must have
Patterns = dict[str, int]  # names, and how many dimensions each has


def nearest(
    path: Path, families: Sequence[ModelFamily], comfyui: HostComfyUI | None, device: torch.device
) -> list[dict[str, Any]]:
    """As the message Compare says.

    Args:
        families: of diffusers' classes.
        comfyui: whose classes count too.
    """
    known = list(_of_families(families))
    if comfyui is not None:
        import_comfyui(comfyui, device)
        from worker.models.comfyui.known import shapes_of_classes

        known += [(name, patterns(shapes)) for name, shapes in shapes_of_classes()]
    stored = stored_tensors(path).items()
    own = patterns({name: tensor.shape for name, tensor in stored if not name.endswith(MARKS)})
    alike: dict[frozenset[tuple[str, int]], list[str]] = {}
    for name, other in known:
        alike.setdefault(frozenset(other.items()), []).append(name)
    found = [_compared(" or ".join(names), own, dict(other)) for other, names in alike.items()]
    found.sort(key=lambda one: (-one["share"], one["name"]))
    return [one for one in found if one["share"] >= LEAST][:MOST]


def patterns(shapes: Mapping[str, Sequence[int]]) -> Patterns:
    """Names with `*` for the numbers in them, and how many dimensions each has."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name): len(shape) for name, shape in shapes.items()}


def _of_families(families: Sequence[ModelFamily]) -> Iterator[tuple[str, Patterns]]:
    """Their classes in the size that diffusers gives them, in diffusers' names and in the release's."""
    for family in families:
        with torch.device("meta"):
            module = family.build({})
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        yield f"{family.name} in diffusers' names", patterns(shapes)
        native = family.native_mapping(dict(module.config)).items()
        released = {source.key: shapes[name] for name, source in native if name in shapes}
        yield f"{family.name} in its release's names", patterns(released)


def _compared(name: str, own: Patterns, other: Patterns) -> dict[str, Any]:
    both = own.keys() & other.keys()
    return {
        "name": name,
        "share": len(both) / max(1, len(own.keys() | other.keys())),
        "more": sorted(own.keys() - other.keys()),
        "lacking": sorted(other.keys() - own.keys()),
        "other": sorted(key for key in both if own[key] != other[key]),
    }
