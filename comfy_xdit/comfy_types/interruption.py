"""ComfyUI's cancel button: a flag that is asked for, and an exception of ComfyUI's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from comfy_xdit.protocol.errors import Interrupted


def interrupted() -> bool:
    """Whether the person has asked to stop; leaves the flag as it is."""
    return comfy.model_management.processing_interrupted()


def raise_if_interrupted() -> None:
    """Raise ComfyUI's own exception, which ends the prompt as cancelled, and clear the flag."""
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def interruptible() -> Iterator[None]:
    """What the ranks report as Interrupted leaves this block as ComfyUI's own exception."""
    try:
        yield
    except Interrupted:
        raise_if_interrupted()
        raise
