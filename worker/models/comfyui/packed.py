"""A weight that stays packed (GGML's quantised types): every operation on it gets its numbers, unpacked then.

For a class of ComfyUI's it is a parameter of its shape, device and dtype like any other, wherever and however
the class uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn

Change = Callable[[torch.Tensor], torch.Tensor]
# It is unpacked in this dtype, and rounded to its own.
UNPACKED = torch.float32
_aten = torch.ops.aten


def packed_types() -> list[str]:
    """Names of the types that can be unpacked here."""
    return sorted(kind.name for kind in dequantize_functions if GGML_QUANT_SIZES[kind][0] > 1)


class PackedWeight(torch.Tensor):
    """A weight of some shape and dtype, over the bytes of its blocks.

    `to` of another device or floating-point dtype gives a packed weight again. Its numbers cannot be written;
    `copy_` takes the blocks of another packed weight.

    Args:
        blocks: uint8, of any shape; the bytes of its elements' blocks, one behind the other.
        kind: the name of GGML's type.
        change: what is done to its numbers, fp32, whenever it is unpacked: the patches of a LoRA.
    """

    blocks: torch.Tensor
    kind: str
    change: Change | None

    @staticmethod
    def __new__(
        cls,
        blocks: torch.Tensor,
        kind: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        change: Change | None = None,
    ) -> PackedWeight:
        """Over `blocks`, which are not copied."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=blocks.device, requires_grad=False
        )
        weight.blocks, weight.kind, weight.change = blocks, kind, change
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.blocks.nbytes

    def __repr__(self) -> str:
        return f"PackedWeight({self.kind}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def unpacked(self) -> torch.Tensor:
        """Its numbers, in its dtype."""
        kind = GGMLQuantizationType[self.kind]
        elements, size = GGML_QUANT_SIZES[kind]
        blocks = self.blocks.reshape(-1, size)
        numbers = dequantize_functions[kind](blocks, elements, size, UNPACKED).reshape(self.shape)
        if self.change is not None:
            numbers = self.change(numbers)
        return numbers.to(self.dtype)

    def over(self, blocks: torch.Tensor, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same kind of weight, over other blocks."""
        return PackedWeight(blocks, self.kind, tuple(self.shape), dtype or self.dtype, self.change)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """What its bytes are in, and the rest, as PyTorch asks wrappers of tensors for it."""
        return ["blocks"], (self.kind, tuple(self.shape), self.dtype, self.change)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], rest: Any, *_: Any) -> PackedWeight:
        """The inverse of `__tensor_flatten__`."""
        kind, shape, dtype, change = rest
        return PackedWeight(inner["blocks"], kind, shape, dtype, change)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation: on the packed weight where it stays one, otherwise on its numbers."""
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if function is _aten.copy_.default and isinstance(args[0], PackedWeight):
            return _copied(*args[:2])
        if function in _KEPT and (dtype is None or dtype.is_floating_point):
            placed = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
            return args[0].over(_KEPT[function](args[0].blocks, **placed), dtype)
        return function(*_numbers(args), **_numbers(kwargs))


def declare(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Have a packed parameter without memory in place of each that `tensors` has packed, by its name."""
    own = dict(module.named_parameters())
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedWeight) and name in own:
            owner, _, leaf = name.rpartition(".")
            without = tensor.over(torch.empty_like(tensor.blocks, device="meta"), own[name].dtype)
            parameter = nn.Parameter(without, requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, parameter)


# Operations whose result is a packed weight too: what they do to the blocks.
_KEPT = {
    _aten.detach.default: torch.Tensor.detach,
    _aten.alias.default: torch.Tensor.detach,
    _aten.clone.default: lambda blocks, **_: blocks.clone(),
    _aten._to_copy.default: lambda blocks, **placed: blocks.to(copy=True, **placed),
    _aten.empty_like.default: lambda blocks, **placed: torch.empty_like(
        blocks, **{name: placed[name] for name in ("device",) if name in placed}
    ),
}


def _copied(target: PackedWeight, source: torch.Tensor) -> PackedWeight:
    if not isinstance(source, PackedWeight) or source.kind != target.kind:
        raise TypeError(f"the numbers of {target!r} cannot be written")
    target.blocks.copy_(source.blocks.reshape(target.blocks.shape))
    return target


def _numbers(value: Any) -> Any:
    """Arguments with the numbers of packed weights in their place."""
    if isinstance(value, PackedWeight):
        return value.unpacked()
    if isinstance(value, (list, tuple)):
        return type(value)(_numbers(part) for part in value)
    return {name: _numbers(part) for name, part in value.items()} if isinstance(value, dict) else value
