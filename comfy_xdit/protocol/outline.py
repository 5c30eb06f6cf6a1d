"""Models on the meta device, of classes that read numbers of their own while they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from comfy_xdit.protocol.errors import InvalidInput

META = torch.device("meta")
_WRITTEN = (torch.tensor, torch.arange, torch.linspace)
# What comes of reading widths and counts off tensors that no model has: of a missing block, 0 channels ...
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def on_meta(make: Callable[[], Any]) -> Any:
    """What `make` builds on the meta device: a BaseModel of ComfyUI's.

    A class may write down numbers and read them again to know a length (the codebook of ACE-Step 1.5). Where
    that fails it is built once more, with its own numbers in memory until it is ready.
    """
    try:
        return make()
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
    with _WrittenNumbers():
        model = make()
    model.diffusion_model.to(META)
    return model


@contextmanager
def of_file(path: object) -> Iterator[None]:
    """Within, what ComfyUI raises of a file whose tensors fit no model is an InvalidInput."""
    try:
        yield
    except InvalidInput:
        raise
    except _MISFITS as error:
        raise InvalidInput(
            f"ComfyUI makes no model of the tensors in {path} ({type(error).__name__}: {error}); the file is "
            "damaged: download it again, or of a variant that this ComfyUI does not know: update ComfyUI."
        ) from error


class _WrittenNumbers(TorchFunctionMode):
    """Within, numbers that are written down have memory on any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _WRITTEN and torch.device(kwargs.get("device") or "cpu") == META:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
