"""Hooks on the calls of a module, or of a method that its model calls in the module's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from torch import nn

Values = dict[str, Any]
Change = Callable[[nn.Module, tuple[Any, ...], Values], tuple[tuple[Any, ...], Values] | None]
See = Callable[[nn.Module, tuple[Any, ...], Values, Any], Any]


class Removable(Protocol):
    """A hook. Those on a method are removed in the reverse of their order."""

    def remove(self) -> None:
        """Leave the module as it was."""


def before(module: nn.Module, method: str, change: Change) -> Removable:
    """`change` may give the positional and named arguments of a call anew."""
    if not method:
        return module.register_forward_pre_hook(change, with_kwargs=True)

    def wrapped(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Values) -> Any:
        args, kwargs = change(module, args, kwargs) or (args, kwargs)
        return call(*args, **kwargs)

    return _Wrapped(module, method, wrapped)


def after(module: nn.Module, method: str, see: See, always_call: bool = False) -> Removable:
    """`see` may give another output than None; with `always_call` it hears of a call that raised, too."""
    if not method:
        return module.register_forward_hook(see, with_kwargs=True, always_call=always_call)

    def wrapped(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Values) -> Any:
        output = None
        try:
            output = call(*args, **kwargs)
        finally:
            changed = see(module, args, kwargs, output) if always_call or output is not None else None
        return output if changed is None else changed

    return _Wrapped(module, method, wrapped)


class _Wrapped:
    """A method of one module, wrapped."""

    def __init__(self, module: nn.Module, method: str, wrapped: Callable[..., Any]):
        self._module, self._method = module, method
        self._earlier = vars(module).get(method)
        call = getattr(module, method)

        @wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            return wrapped(call, args, kwargs)

        object.__setattr__(module, method, called)

    def remove(self) -> None:
        """Leave the module as it was."""
        object.__delattr__(self._module, self._method)
        if self._earlier is not None:
            object.__setattr__(self._module, self._method, self._earlier)
