"""The weights of a twin: each has a name, a shape and a dtype, and its numbers are in the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput

# What may be asked of a weight that is not here. Everything else reads, writes, casts or moves it.
_PROPERTIES = (
    "_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn",
    "is_mps", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xpu", "itemsize", "layout",
    "nbytes", "ndim", "output_nr", "requires_grad", "shape",
)  # fmt: skip
_METHODS = (
    "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_pinned", "is_same_size", "is_shared", "is_signed", "ndimension",
    "nelement", "numel", "requires_grad_", "size", "storage_offset", "stride",
)  # fmt: skip
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(getattr(torch, name) for name in _METHODS if hasattr(torch, name)),
    torch.Tensor.requires_grad.__set__,
}
# These give the weight again, as without numbers as it was.
_SAME = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}


class RemoteWeight(torch.nn.Parameter):
    """A meta tensor that knows its `weight_name`; whoever wants its numbers is told where they are."""

    weight_name: str

    def __new__(cls, like: torch.Tensor, name: str) -> RemoteWeight:
        """A weight of the shape and dtype of `like`."""
        weight = torch.Tensor._make_subclass(cls, like, False)
        weight.weight_name = name
        return weight

    def __repr__(self) -> str:
        return f"RemoteWeight({self.weight_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer for what needs no numbers. Raises InvalidInput for the rest."""
        if function in _METADATA or function in _SAME:
            with torch._C.DisableTorchFunctionSubclass():
                answer = function(*args, **(kwargs or {}))
                return cls(answer, args[0].weight_name) if function in _SAME else answer
        name = _first_name((args, kwargs))
        called = getattr(function, "__qualname__", None) or getattr(function, "__name__", function)
        raise InvalidInput(
            f"{name} is a weight of an xDiT MODEL: it is in the ranks, and here it can neither be read, "
            f"written, cast nor moved ({called}). Remove the node that does it, or use the stock loader "
            "instead of the xDiT one."
        )


def take_away(model: torch.nn.Module, child: str) -> None:
    """Put a RemoteWeight in the place of every parameter below `child` of `model`."""
    weights: dict[int, RemoteWeight] = {}  # one for each that is shared
    for path, module in model.get_submodule(child).named_modules(prefix=child):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                weight = weights.setdefault(id(parameter), RemoteWeight(parameter, f"{path}.{key}"))
                module._parameters[key] = weight


def _first_name(values: Any) -> str:
    """The name of a weight among arguments, however nested."""
    waiting = [values]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, RemoteWeight):
            return value.weight_name
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return "a tensor"
