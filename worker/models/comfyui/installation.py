"""The host's ComfyUI in this process: found where the host says, set as the host is set, imported once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import HostComfyUI, comfyui_version

_imported: HostComfyUI | None = None


def import_comfyui(host: HostComfyUI, device: torch.device) -> None:
    """Have the packages of the host's ComfyUI importable, with its switches.

    Its root stands behind everything on the path: what it has there beside its packages (`nodes`, `utils`,
    `tests`) never takes the place of a module of this process.

    Raises:
        InvalidInput: the files are of another version than the host runs, or this process has imported
            another ComfyUI.
    """
    global _imported
    found = comfyui_version(Path(host.root)) or "no ComfyUI"
    if found != host.version:
        raise InvalidInput(
            f"the host runs ComfyUI {host.version}, and {host.root} holds {found}: it was updated meanwhile; "
            "restart ComfyUI."
        )
    if _imported == host:
        return
    if _imported is not None:
        raise InvalidInput(
            f"this rank has imported ComfyUI {_imported.version} of {_imported.root} with "
            f"{_words(_imported)}, and is asked for {host.version} of {host.root} with {_words(host)}; "
            "restart ComfyUI."
        )
    if host.root not in sys.path:
        sys.path.append(host.root)
    spec = importlib.util.find_spec("comfy.cli_args")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parents[1] != Path(host.root):
        raise InvalidInput(
            f"`comfy` in this environment is that of {spec and spec.origin}, not the package in {host.root}; "
            "uninstall the other one."
        )
    _set_switches(host, device)
    _imported = host


def _set_switches(host: HostComfyUI, device: torch.device) -> None:
    """As the host is set. ComfyUI reads most of them once, when comfy.model_management is imported."""
    import comfy.cli_args

    args = comfy.cli_args.args
    for name, value in host.switches:
        if not hasattr(args, name):
            raise InvalidInput(f"ComfyUI {host.version} in {host.root} knows no switch {name!r}; restart it.")
        setattr(args, name, _value(value))
    args.cpu = device.type == "cpu"


def _value(value: Any) -> Any:
    """A switch's value: names are those of the optimisations of `--fast`."""
    if not isinstance(value, tuple):
        return value
    features: type[Enum] = importlib.import_module("comfy.cli_args").PerformanceFeature
    return {features(name) for name in value}


def _words(host: HostComfyUI) -> str:
    return ", ".join(f"{name}={value}" for name, value in host.switches) or "no switches"
