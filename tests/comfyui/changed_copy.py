"""A copy of the ComfyUI at hand whose models were changed, with its version number as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.spec import HostComfyUI
from comfy_xdit.ranks.registry import running_groups

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


@contextlib.contextmanager
def hosting(
    factory: pytest.TempPathFactory, changes: Mapping[str, tuple[Change, ...]]
) -> Iterator[HostComfyUI]:
    """A changed copy, for ranks that remember in a folder of their own what they prove of it."""
    changed = changed_copy(factory.mktemp("changed"), changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remembered.FOLDER, str(factory.mktemp("cache")))
        end_ranks()  # of other tests, which have imported another ComfyUI
        yield changed
    end_ranks()


def end_ranks() -> None:
    """Of all groups: what imported one ComfyUI imports no other."""
    for group in running_groups():
        group.close()
