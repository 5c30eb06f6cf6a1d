"""The code that a twin's transformer runs, as it was: functions of its classes, and beside them.

Packs put functions of theirs over `Flux.forward_orig`, over a block's `forward` or over a file's
`optimized_attention`, for every model at once and until ComfyUI ends. The ranks have the code as ComfyUI
brings it.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

OURS = "comfy_xdit."
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod, property)
# Of what every module has, this acts in a call; the rest builds, moves and saves.
_CALLING = ("__call__", "_call_impl", "_wrapped_call_impl")
# By name of a class or file: its functions, and the names of all it held, when this process first made a
# twin of it. A change that lasts is one for the twins that follow, too.
_first: dict[str, tuple[dict[str, Any], set[str]]] = {}


class OriginalCode:
    """Functions of the classes of a transformer's modules, and of the Python files they are written in.

    Args:
        transformer: files of its own package are looked at, as far as one takes functions of another.
        packs: folders of custom nodes. What lies there is not ComfyUI's, whenever it came.
    """

    def __init__(self, transformer: torch.nn.Module, packs: Sequence[str] = ()):
        bases = {base: None for module in transformer.modules() for base in type(module).__mro__[:-1]}
        package = ".".join(type(transformer).__module__.split(".")[:2])
        self._spaces = [_of_class(base) for base in bases]
        self._spaces += [_of_file(name) for name in _files(bases, package)]
        # The same once more, flat: what is looked at in each call of the transformer.
        self._values = [(space.live, key, f) for space in self._spaces for key, f in space.functions.items()]
        self._live = [space.live for space in self._spaces if space.bases]
        self._sizes = list(map(len, self._live))
        folders = tuple(os.path.join(folder, "") for folder in packs)
        self._foreign = [name for space in self._spaces for name in space.foreign(folders)]

    def is_same(self) -> bool:
        """Whether nothing can have changed, in microseconds."""
        return (
            not self._foreign
            and list(map(len, self._live)) == self._sizes
            and all(live.get(key) is value for live, key, value in self._values)
        )

    def changes(self) -> Iterator[str]:
        """Names of what differs."""
        yield from self._foreign
        for space in self._spaces:
            yield from space.changes()

    def accept(self) -> None:
        """Attributes that classes have more, and that mean nothing, are no change."""
        self._sizes = list(map(len, self._live))


class _Space:
    """A class or a Python file: what it holds (`live`), and what its functions were.

    Args:
        keys: what of it is looked at.
        lasting: it is the same for all twins; layers of a twin are of classes of its own.
        bases: of a class, whose attributes a new one hides.
    """

    def __init__(
        self, name: str, live: Mapping[str, Any], keys: Iterable[str], lasting: bool,
        bases: tuple[type, ...] = (),
    ):  # fmt: skip
        self.name, self.live, self.bases = name, live, bases
        now = {key: live[key] for key in keys if isinstance(live.get(key), _FUNCTIONS)}, set(live)
        self.functions, self._keys = _first.setdefault(name, now) if lasting else now

    def changes(self) -> Iterator[str]:
        """Names of what differs."""
        for key, function in self.functions.items():
            if self.live.get(key) is not function:
                yield f"{self.name}.{key}"
        for key in self.live.keys() - self._keys:
            acts = callable(self.live[key]) or isinstance(self.live[key], property)
            if acts and any(hasattr(base, key) for base in self.bases):
                yield f"{self.name}.{key}"

    def foreign(self, folders: tuple[str, ...]) -> Iterator[str]:
        """Names of functions that are written in one of `folders`."""
        for key, function in self.functions.items():
            plain = _plain(function)
            file = plain.__code__.co_filename if plain is not None else ""
            if file.startswith(folders) and not str(plain.__globals__.get("__name__")).startswith(OURS):
                yield f"{self.name}.{key} (of {file})"


def _of_class(base: type) -> _Space:
    found: Any = sys.modules.get(base.__module__)
    for part in base.__qualname__.split("."):
        found = getattr(found, part, None)
    keys = _CALLING if base is torch.nn.Module else vars(base)
    name = f"{base.__module__}.{base.__qualname__}"
    return _Space(name, vars(base), keys, found is base, base.__mro__[1:])


def _of_file(name: str) -> _Space:
    live = vars(sys.modules[name])
    return _Space(name, live, live, lasting=True)


def _files(bases: Collection[type], package: str) -> list[str]:
    """Names of the Python files of a package that classes are written in, and of those these use.

    PyTorch's own functions are among them: attention by any other name.
    """
    found = {torch.nn.functional.__name__: None}
    waiting = [base.__module__ for base in bases]
    while waiting:
        name = waiting.pop()
        if name in found or name not in sys.modules or not f"{name}.".startswith(f"{package}."):
            continue
        found[name] = None
        held = vars(sys.modules[name]).values()
        waiting += {str(f.__globals__.get("__name__")) for f in held if isinstance(f, types.FunctionType)}
    return list(found)


def _plain(function: Any) -> types.FunctionType | None:
    """The Python function in a method, a property ...; None where there is none."""
    for inner in ("__func__", "fget"):
        function = getattr(function, inner, function)
    return function if isinstance(function, types.FunctionType) else None
