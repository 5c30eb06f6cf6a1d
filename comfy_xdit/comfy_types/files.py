"""The models a person can choose: ComfyUI's folders, and the demo that comes with the pack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from comfy_xdit import demo_files
from comfy_xdit.nodes.surroundings import KINDS
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.gguf_header import SUFFIX
from comfy_xdit.protocol.safetensors_header import SUFFIXES, check_suffix

# What makes a folder a model, for the kinds where one can be.
MARKS = {"diffusers": "model_index.json", "controlnet": "config.json"}
IP_ADAPTERS = "ipadapter"
MODELS = "diffusion_models"
GGUF = "unet_gguf"  # the same folders, of which ComfyUI lists files of the kinds alone that it reads itself


def names(kind: str) -> list[str]:
    """Names for a widget: what the ranks can read of models/`kind`, files before folders, then the demo's."""
    _know_ip_adapters()
    files = [] if kind == "diffusers" else folder_paths.get_filename_list(kind)
    files = [name for name in files if name.lower().endswith(SUFFIXES)]
    if kind == MODELS:
        _know_gguf()
        files = sorted({*files, *folder_paths.get_filename_list(GGUF)})
    return files + sorted(set(_folders(kind))) + demo_files.names(kind)


def path(kind: str, name: str) -> Path:
    """The file or folder behind a name of `names(kind)`. Raises InvalidInput if there is none.

    A file that ComfyUI would list and `names` does not is refused with the reason.
    """
    _know_ip_adapters()
    demo = demo_files.path_of(kind, name)
    if demo is not None and demo.exists():
        return demo
    for root in _roots(kind):
        if _is_model(kind, root / name, root):
            return root / name
    file = None if kind == "diffusers" else folder_paths.get_full_path(kind, name)
    if file is None or not os.path.exists(file):
        what = "its folder" if kind == "diffusers" else "it"
        raise InvalidInput(f"no {KINDS[kind]} {name!r}; put {what} into models/{kind} and press R.")
    if kind != MODELS or not name.lower().endswith(SUFFIX):
        check_suffix(Path(file))
    return Path(file)


def _folders(kind: str) -> Iterator[str]:
    """The folders below models/`kind` that are models, by their names there."""
    for root in _roots(kind):
        for folder, _, _ in os.walk(root, followlinks=True):
            if _is_model(kind, Path(folder), root):
                yield os.path.relpath(folder, root)


def _roots(kind: str) -> list[Path]:
    """Where folders that are models may be."""
    return [Path(root) for root in folder_paths.get_folder_paths(kind)] if kind in MARKS else []


def _is_model(kind: str, folder: Path, root: Path) -> bool:
    # A config.json in models/controlnet itself belongs to a file beside it.
    return (folder / MARKS[kind]).is_file() and (folder != root or kind == "diffusers")


def _know_gguf() -> None:
    """Register GGUF files among the diffusion models, unless another pack has, under the same name."""
    known = folder_paths.folder_names_and_paths
    if GGUF not in known:
        known[GGUF] = (known[MODELS][0], {SUFFIX})


def _know_ip_adapters() -> None:
    """Register models/ipadapter, which ComfyUI does not know, unless another pack or a YAML file has."""
    if IP_ADAPTERS not in folder_paths.folder_names_and_paths:
        folder = os.path.join(folder_paths.models_dir, IP_ADAPTERS)
        folder_paths.folder_names_and_paths[IP_ADAPTERS] = (
            [folder],
            set(folder_paths.supported_pt_extensions),
        )
