"""The plain form of a message: JSON plus a list of tensors, no pickle."""

from __future__ import annotations

import functools
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch

from comfy_xdit.protocol.errors import shown
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
    """The message whose plain form is (`head`, `tensors`).

    Raises:
        ValueError: it is the plain form of nothing.
        RecursionError: it is deeper than any message is.
    """
    if isinstance(head, list):
        return [rebuild(v, tensors) for v in head]
    if not isinstance(head, dict):
        return head
    if len(head) != 1:
        raise ValueError(f"an object has {len(head)} names, where one says what it is")
    ((tag, body),) = head.items()
    if tag == "tensor":
        if type(body) is not int or not 0 <= body < len(tensors):
            raise ValueError(f"tensor {shown(body)} of {len(tensors)} is named")
        return tensors[body]
    if tag in ("tuple", "dict") and not isinstance(body, list):
        raise ValueError(f"a {tag} is made of {type(body).__name__}")
    if tag == "tuple":
        return tuple(rebuild(v, tensors) for v in body)
    return _dict(body, tensors) if tag == "dict" else _word(tag, body, tensors)


def _dict(pairs: list[Any], tensors: list[torch.Tensor]) -> dict[Any, Any]:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("a dict is not made of pairs")
    rebuilt = [(rebuild(k, tensors), rebuild(v, tensors)) for k, v in pairs]
    try:
        return dict(rebuilt)
    except TypeError as error:
        raise ValueError(f"a dict has a key that cannot be one: {error}") from error


def _word(name: str, body: Any, tensors: list[torch.Tensor]) -> Any:
    word = WORDS.get(name)
    if word is None or not isinstance(body, dict):
        raise ValueError(f"{shown(name)} is no word of this version, or has no fields")
    due, known = _names(word)
    if not due <= body.keys() <= known:
        raise ValueError(f"{name} has other fields than {', '.join(sorted(known))}")
    return word(**{k: rebuild(v, tensors) for k, v in body.items()})


@functools.cache
def _names(word: type) -> tuple[set[str], set[str]]:
    """Of the fields it must have, and of all it may have."""
    without = {f.name for f in fields(word) if f.default is MISSING and f.default_factory is MISSING}
    return without, {f.name for f in fields(word)}


def check_fields(word: Any) -> None:
    """Raise ValueError unless every field of a word holds what it is declared to hold, not looked into."""
    for name, hint in _hints(type(word)).items():
        if not _is(value := getattr(word, name), hint):
            raise ValueError(f"{type(word).__name__} has {type(value).__name__} for its {name}")


@functools.cache
def _hints(word: type) -> dict[str, Any]:
    # messages.py names torch in hints, and imports it for type checkers alone.
    return get_type_hints(word, localns={"torch": torch})


def _is(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_is(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
