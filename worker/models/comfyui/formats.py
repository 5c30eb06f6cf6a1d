"""Layers in formats of ComfyUI's own (scaled fp8, mixed precision), each given its tensors apart.

Such a layer makes its weight, a tensor with scales, of what the file has when it is given that.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from worker.models.comfyui.detection import Tensors

ALIGNMENT = 64  # bytes: of what the widest instructions read at once
# Parameters that a layer sets to 1 itself, where the file does not scale it.
MADE_BY_LAYERS = (".scale_weight", ".scale_input")


def copied(view: torch.Tensor) -> torch.Tensor:
    """A view of a file in memory of its own, aligned as it lies there: kernels for a CPU differ by that."""
    room = torch.empty(view.nbytes + ALIGNMENT, dtype=torch.uint8)
    begin = (view.data_ptr() - room.data_ptr()) % ALIGNMENT
    if begin % view.itemsize:
        return view.clone()
    own = room[begin : begin + view.nbytes].view(view.dtype).view(view.shape)
    return own.copy_(view)


def make_weights(module: nn.Module, tensors: Tensors) -> None:
    """Have every layer make its weight that has none of the right kind before; on the layer's device."""
    stored = _by_layer(tensors)
    for name, layer in module.named_modules():
        own = layer._parameters.get("weight")
        if f"{name}.weight" in tensors and (own is None or f"{name}.comfy_quant" in tensors):
            _give(layer, name, stored[name])


def fill_layers(
    module: nn.Module, tensors: Tensors, elsewhere: Collection[str], apart: bool
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Copy the weights into `module`, and have no more than one layer's in memory besides.

    Args:
        apart: layers get copies of `tensors`.

    Yields:
        Names of parameters `elsewhere`, which are left as they are, with what they are to be; and of those
        that are not in `tensors`, with None.

    Raises:
        ValueError, KeyError, RuntimeError: ComfyUI's words for what does not fit.
    """
    stored = _by_layer(tensors)
    for name, layer in module.named_modules():
        before, prefix = dict(layer._parameters), f"{name}." if name else ""
        own_tensors = stored.get(name, {})
        if apart:
            own_tensors = {key: copied(tensor) for key, tensor in own_tensors.items()}
        lacking = _give(layer, name, own_tensors)
        for leaf, own in before.items():
            if leaf in lacking:
                made = own is not None and f".{leaf}".endswith(MADE_BY_LAYERS)
                yield prefix + leaf, torch.ones_like(own) if made else None
            elif prefix + leaf in elsewhere:
                yield prefix + leaf, layer._parameters[leaf]
            if prefix + leaf in elsewhere:
                layer._parameters[leaf] = own


def unpatched(layer: nn.Module, name: str, tensors: Tensors) -> nn.Module:
    """The same layer with the weights that the file has, apart from the loaded one.

    Args:
        tensors: of the file, under the names of ComfyUI's class.
    """
    fresh = copy.copy(layer)
    fresh._parameters = {
        leaf: own if own is None or hasattr(own, "__tensor_flatten__") else _like(leaf, own)
        for leaf, own in layer._parameters.items()
    }
    _give(fresh, name, {key: t for key, t in tensors.items() if key.rpartition(".")[0] == name})
    return fresh


def _like(leaf: str, parameter: nn.Parameter) -> nn.Parameter:
    """To be written to; as a layer makes it, where the file may lack it."""
    made = torch.ones_like if f".{leaf}".endswith(MADE_BY_LAYERS) else torch.empty_like
    return nn.Parameter(made(parameter), requires_grad=False)


def _give(layer: nn.Module, name: str, stored: Mapping[str, torch.Tensor]) -> list[str]:
    """Have a layer take its own tensors as load_state_dict would; which of its own it is not given."""
    prefix = f"{name}." if name else ""
    lacking: list[str] = []
    errors: list[str] = []
    layer._load_from_state_dict(dict(stored), prefix, {}, True, lacking, [], errors)
    if errors:
        raise ValueError("; ".join(errors))
    return [key.removeprefix(prefix) for key in lacking]


def _by_layer(tensors: Tensors) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        found.setdefault(name.rpartition(".")[0], {})[name] = tensor
    return found
