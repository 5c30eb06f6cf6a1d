"""The models that a workflow can name without ComfyUI: the demo's, those in XDIT_MODELS_DIR, and paths."""

from __future__ import annotations

import os
from pathlib import Path

from comfy_xdit import demo_files
from comfy_xdit.nodes.surroundings import KINDS
from comfy_xdit.protocol.errors import InvalidInput

# Environment: a folder with diffusers/, diffusion_models/, loras/, vae/, controlnet/, ipadapter/
MODELS_DIR = "XDIT_MODELS_DIR"
INDEX = "model_index.json"
# Kinds of which a folder can be one, and what such a folder holds.
MARKS = {"diffusers": f"**/{INDEX}", "controlnet": "**/*/config.json"}
FILE_OR_FOLDER = ("vae", "controlnet")


class Names(list[str]):
    """The names a widget offers. A path that exists counts as one of them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and os.path.exists(name))


def names(kind: str) -> Names:
    """Names for a widget: what is below XDIT_MODELS_DIR/`kind`, files before folders, then the demo's."""
    found = []
    for folder in _folders(kind):
        files = [] if kind == "diffusers" else folder.rglob("*.safetensors")
        marks = folder.glob(MARKS[kind]) if kind in MARKS else []
        found += sorted(path.relative_to(folder).as_posix() for path in files)
        found += sorted(mark.parent.relative_to(folder).as_posix() for mark in marks)
    return Names(found + demo_files.names(kind))


def path(kind: str, name: str) -> Path:
    """What is behind a name of `names(kind)`, or the path `name`. Raises InvalidInput if nothing is."""
    demo = demo_files.path_of(kind, name)
    for place in [*([demo] if demo else []), *(folder / name for folder in _folders(kind)), Path(name)]:
        if _is_model(kind, place):
            return place
    if kind == "diffusers":
        what = f"a diffusers folder (one with a {INDEX})"
    else:
        what = "a safetensors file" + (" or of a diffusers folder" if kind in FILE_OR_FOLDER else "")
    raise InvalidInput(
        f"no {KINDS[kind]} {name!r}; give the path of {what}, or put it into {kind}/ of the folder named by "
        f"{MODELS_DIR}."
    )


def _is_model(kind: str, place: Path) -> bool:
    if kind == "diffusers":
        return (place / INDEX).is_file()
    return place.exists() if kind in FILE_OR_FOLDER else place.is_file()


def _folders(kind: str) -> list[Path]:
    root = os.environ.get(MODELS_DIR)
    return [Path(root) / kind] if root and (Path(root) / kind).is_dir() else []
