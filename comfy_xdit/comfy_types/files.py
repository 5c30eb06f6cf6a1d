"""The models a person can choose: ComfyUI's folders, and the demo that comes with the pack."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from comfy_xdit import demo_files
from comfy_xdit.protocol.errors import InvalidInput

INDEX = "model_index.json"
CONFIG = "config.json"
IP_ADAPTERS = "ipadapter"


def diffusion_models() -> list[str]:
    """Names for a widget: the files in models/diffusion_models, then the demo."""
    return folder_paths.get_filename_list("diffusion_models") + demo_files.names("diffusion_models")


def diffusion_model_path(name: str) -> Path:
    """The file behind a name of `diffusion_models`. Raises InvalidInput if there is none."""
    return _path("diffusion model", "diffusion_models", name)


def loras() -> list[str]:
    """Names for a widget: the files in models/loras, then the demo's."""
    return folder_paths.get_filename_list("loras") + demo_files.names("loras")


def lora_path(name: str) -> Path:
    """The file behind a name of `loras`. Raises InvalidInput if there is none."""
    return _path("LoRA", "loras", name)


def control_nets() -> list[str]:
    """Names for a widget: the files in models/controlnet, the diffusers folders in it, the demo's."""
    folders = set()
    for root in folder_paths.get_folder_paths("controlnet"):
        for folder, _, files in os.walk(root, followlinks=True):
            if CONFIG in files and folder != root:
                folders.add(os.path.relpath(folder, root))
    return folder_paths.get_filename_list("controlnet") + sorted(folders) + demo_files.names("controlnet")


def control_net_path(name: str) -> Path:
    """The file or folder behind a name of `control_nets`. Raises InvalidInput if there is none."""
    for root in folder_paths.get_folder_paths("controlnet"):
        if (folder := Path(root) / name) != Path(root) and (folder / CONFIG).is_file():
            return folder
    return _path("ControlNet", "controlnet", name)


def ip_adapters() -> list[str]:
    """Names for a widget: the files in models/ipadapter, a folder that ComfyUI itself does not know."""
    _know_ip_adapters()
    return folder_paths.get_filename_list(IP_ADAPTERS)


def ip_adapter_path(name: str) -> Path:
    """The file behind a name of `ip_adapters`. Raises InvalidInput if there is none."""
    _know_ip_adapters()
    return _path("IP-Adapter", IP_ADAPTERS, name)


def _know_ip_adapters() -> None:
    """Register the folder, unless another pack or extra_model_paths.yaml has."""
    if IP_ADAPTERS not in folder_paths.folder_names_and_paths:
        folder = os.path.join(folder_paths.models_dir, IP_ADAPTERS)
        folder_paths.folder_names_and_paths[IP_ADAPTERS] = (
            [folder],
            set(folder_paths.supported_pt_extensions),
        )


def pipelines() -> list[str]:
    """Names for a widget: the folders with a model_index.json in models/diffusers, then the demo."""
    names = set()
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, _, files in os.walk(root, followlinks=True):
            if INDEX in files:
                names.add(os.path.relpath(folder, root))
    return sorted(names) + demo_files.names("diffusers")


def pipeline_path(name: str) -> Path:
    """The folder behind a name of `pipelines`.

    Raises:
        InvalidInput: there is none.
    """
    candidates = [Path(root) / name for root in folder_paths.get_folder_paths("diffusers")]
    for path in [demo_files.path_of("diffusers", name), *candidates]:
        if path is not None and (path / INDEX).is_file():
            return path
    raise InvalidInput(f"no pipeline {name!r}; put its folder into models/diffusers and press R.")


def vaes() -> list[str]:
    """Names for a widget: the files in models/vae, then the demo."""
    return folder_paths.get_filename_list("vae") + demo_files.names("vae")


def vae_path(name: str) -> Path:
    """The file or folder behind a name of `vaes`. Raises InvalidInput if there is none."""
    return _path("VAE", "vae", name)


def _path(what: str, kind: str, name: str) -> Path:
    """Where a file is that ComfyUI lists in models/`kind`, or one of the demo's, which come first."""
    path = demo_files.path_of(kind, name) or folder_paths.get_full_path(kind, name)
    if path is None or not os.path.exists(path):
        raise InvalidInput(f"no {what} {name!r}; put it into models/{kind} and press R.")
    return Path(path)
