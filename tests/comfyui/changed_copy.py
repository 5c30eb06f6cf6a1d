"""A copy of the ComfyUI at hand whose models were changed, with its version number as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from comfy_xdit.protocol.spec import HostComfyUI

Change = tuple[str, str]  # a text of a file, and what stands in its place


def changed_copy(folder: Path, changes: Mapping[str, tuple[Change, ...]]) -> HostComfyUI:
    """Its `comfy` in a folder, with changes by file of comfy/ldm; all else is linked to."""
    root, original = folder / "ComfyUI", Path(os.environ["COMFYUI_DIR"]).resolve()
    root.mkdir()
    for entry in original.iterdir():
        if entry.name != "comfy":
            (root / entry.name).symlink_to(entry)
    shutil.copytree(original / "comfy", root / "comfy", ignore=shutil.ignore_patterns("__pycache__"))
    for name, of_file in changes.items():
        file = root / "comfy" / "ldm" / name
        text = file.read_text()
        for old, new in of_file:
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new)
        file.write_text(text)
    return HostComfyUI.at(root)
