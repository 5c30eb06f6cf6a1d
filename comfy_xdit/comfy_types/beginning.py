"""What is done once, before the first model: hear of ComfyUI's unloading, look at this ComfyUI."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import comfy.model_management

from comfy_xdit.comfy_types.contract import findings
from comfy_xdit.protocol.installed_in import remember_comfyui
from comfy_xdit.ranks.registry import holders

_log = logging.getLogger(__name__)


def begin() -> None:
    """Prepare for a model, before it is loaded; does its work once in a process."""
    _release_when_comfyui_unloads()
    _say_what_has_changed()
    _remember_where_this_is()


def self_check() -> tuple[str, ...]:
    """A sentence for everything that the pack relies on and this ComfyUI does otherwise."""
    return findings()


@functools.cache
def _release_when_comfyui_unloads() -> None:
    """Have the ranks let go of their models when the person asks ComfyUI to unload all.

    Asked of one patcher, unloading says only that others need memory. `/free` and the button behind
    it call this function and nothing else that tells them from that, so it is wrapped.
    """
    stock = comfy.model_management.unload_all_models

    @functools.wraps(stock)
    def unload_all_models(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        holders.release_all()
        return result

    comfy.model_management.unload_all_models = unload_all_models


@functools.cache
def _say_what_has_changed() -> None:
    for sentence in findings():
        _log.warning("comfy_xdit does not know this ComfyUI in one point: %s", sentence)


@functools.cache
def _remember_where_this_is() -> None:
    """For `doctor`, which may be run from a custom_nodes folder that is in no ComfyUI (--base-directory)."""
    remember_comfyui(str(Path(comfy.model_management.__file__).resolve().parents[1]))
