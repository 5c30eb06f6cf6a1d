"""Which known families a file looks like: by the names of its tensors, with any number for a block's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.model_files import stored_tensors
from worker.models.base import ModelFamily

MOST = 3
LEAST = 0.05  # of the names of both, the share that both must have
Patterns = dict[str, int]  # names without block numbers, and how many dimensions


def nearest(path: Path, known: Mapping[str, Patterns]) -> list[dict[str, Any]]:
    """As the message Compare says, of the families in `known`."""
    own = patterns({name: tensor.shape for name, tensor in stored_tensors(path).items()})
    found = [_compared(name, own, other) for name, other in known.items()]
    found.sort(key=lambda one: (-one["share"], one["name"]))
    return [one for one in found if one["share"] >= LEAST][:MOST]


def of_families(families: tuple[ModelFamily, ...]) -> Iterator[tuple[str, Patterns]]:
    """diffusers' classes in their own size, under diffusers' names and under the original release's."""
    for family in families:
        with torch.device("meta"):
            module = family.build({})
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        yield f"{family.name} (diffusers' names)", patterns(shapes)
        native = family.native_mapping(dict(module.config)).items()
        yield (
            f"{family.name} (the release's names)",
            patterns({source.key: shapes[name] for name, source in native}),
        )


def patterns(shapes: Mapping[str, tuple[int, ...]]) -> Patterns:
    """Names with `*` for the numbers in them, and how many dimensions each has."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name): len(shape) for name, shape in shapes.items()}


def _compared(name: str, own: Patterns, other: Patterns) -> dict[str, Any]:
    both = own.keys() & other.keys()
    return {
        "name": name,
        "share": len(both) / max(1, len(own.keys() | other.keys())),
        "more": sorted(own.keys() - other.keys()),
        "lacking": sorted(other.keys() - own.keys()),
        "other": sorted(key for key in both if own[key] != other[key]),
    }
