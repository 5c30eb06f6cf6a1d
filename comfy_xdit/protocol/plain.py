"""The plain form of a message: JSON plus a list of tensors, no pickle."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from comfy_xdit.protocol.messages import WORDS


@dataclass
class Flat:
    """A message in plain form: `head` is JSON-able and names tensors by their place in `tensors`.

    A tensor that stands in a message several times (a ControlNet gives one residual to many
    blocks) is in `tensors` once.
    """

    head: Any = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict, repr=False)

    def place(self, tensor: torch.Tensor) -> int:
        """Where `tensor` is in `tensors`, where it is put the first time."""
        # `tensors` keeps every one alive, so no id is given twice.
        place = self._places.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
        return place


def flatten(message: Any) -> Flat:
    """Plain form of a message.

    Raises:
        TypeError: something in it is neither plain data, a tensor nor a word of messages.py.
    """
    flat = Flat()
    flat.head = _plain(message, flat)
    return flat


def _plain(value: Any, flat: Flat) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": flat.place(value)}
    if isinstance(value, list):
        return [_plain(v, flat) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, flat) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(k, flat), _plain(v, flat)] for k, v in value.items()]}
    name = type(value).__name__
    if is_dataclass(value) and WORDS.get(name) is type(value):
        return {name: {f.name: _plain(getattr(value, f.name), flat) for f in fields(value)}}
    raise TypeError(f"{name} cannot cross the bridge: only plain data and tensors can")


def rebuild(head: Any, tensors: list[torch.Tensor]) -> Any:
    """The message whose plain form is (`head`, `tensors`)."""
    if isinstance(head, list):
        return [rebuild(v, tensors) for v in head]
    if not isinstance(head, dict):
        return head
    ((tag, body),) = head.items()
    if tag == "tensor":
        return tensors[body]
    if tag == "tuple":
        return tuple(rebuild(v, tensors) for v in body)
    if tag == "dict":
        return {rebuild(k, tensors): rebuild(v, tensors) for k, v in body}
    return WORDS[tag](**{k: rebuild(v, tensors) for k, v in body.items()})
