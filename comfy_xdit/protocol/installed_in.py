"""Which ComfyUI this pack belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_xdit import ROOT
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.spec import comfyui_version

NAME = "comfyui.json"  # remembered: the pack's folder -> the ComfyUI that last loaded a model with it


def own_comfyui() -> Path | None:
    """The ComfyUI this pack belongs to: the one around it, else the one that last loaded it.

    With --base-directory, or by a link, custom_nodes is in another place than ComfyUI itself.
    """
    around = ROOT.parent.parent
    if ROOT.parent.name == "custom_nodes" and is_comfyui(around):
        return around
    loaded_by = remembered.read(NAME, _check).get(str(ROOT))
    return Path(loaded_by) if loaded_by is not None and is_comfyui(Path(loaded_by)) else None


def is_comfyui(folder: Path) -> bool:
    """Whether a ComfyUI's own files are there."""
    return (folder / "comfy").is_dir() and comfyui_version(folder) is not None


def remember_comfyui(root: str) -> None:
    """Keep which ComfyUI has loaded this pack, for a doctor that cannot tell by the folder."""
    if remembered.read(NAME, _check).get(str(ROOT)) != root:
        remembered.update(NAME, _check, lambda found: found.update({str(ROOT): root}) is None)


def _check(found: Any) -> None:
    """Raise ValueError for what is not folder -> folder."""
    if not isinstance(found, dict) or not all(isinstance(root, str) for root in found.values()):
        raise ValueError("not a table of folders")
