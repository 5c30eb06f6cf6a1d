"""Models on the meta device, of classes that read numbers of their own while they are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_WRITTEN = (torch.tensor, torch.arange, torch.linspace)


def on_meta(make: Callable[[], Any]) -> Any:
    """What `make` builds on the meta device: a BaseModel of ComfyUI's.

    A class may write down numbers and read them again to know a length (the codebook of ACE-Step 1.5). Where
    that fails it is built once more, with its own numbers in memory until it is ready.
    """
    try:
        return make()
    except RuntimeError as error:
        if not asks_for_numbers(error):
            raise
    with _WrittenNumbers():
        model = make()
    model.diffusion_model.to(META)
    return model


def asks_for_numbers(error: RuntimeError) -> bool:
    """Whether it is torch's answer to who wants to know a number of a tensor on the meta device."""
    return "meta tensors" in str(error)


class _WrittenNumbers(TorchFunctionMode):
    """Within, numbers that are written down have memory on any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _WRITTEN and torch.device(kwargs.get("device") or "cpu") == META:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
