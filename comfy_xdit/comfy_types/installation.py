"""This ComfyUI, as ranks that import its classes must know it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfyui_version

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import HostComfyUI

# What a switch says of the host alone: its server, folders, caches, devices, memory, text encoders and VAE.
# Any other one travels, also one of a later version: it may act on a transformer.
OF_THE_HOST = {
    "listen", "port", "tls_keyfile", "tls_certfile", "enable_cors_header", "max_upload_size",
    "base_directory",
    "extra_model_paths_config", "output_directory", "temp_directory", "input_directory", "user_directory",
    "models_directory", "auto_launch", "disable_auto_launch", "cuda_device", "default_device", "cuda_malloc",
    "disable_cuda_malloc", "directml", "oneapi_device_selector", "preview_method", "preview_size",
    "cache_ram", "cache_classic", "cache_lru", "cache_none", "high_ram", "enable_manager",
    "disable_manager_ui", "enable_manager_legacy_ui", "gpu_only", "highvram", "normalvram", "lowvram",
    "novram", "cpu", "reserve_vram", "vram_headroom", "disable_nvml_pressure", "async_offload",
    "disable_async_offload", "disable_dynamic_vram", "enable_dynamic_vram", "fast_disk", "force_non_blocking",
    "default_hashing_function", "disable_smart_memory", "debug_hang", "disable_pinned_memory",
    "mmap_torch_files", "disable_mmap", "dont_print_server", "quick_test_for_ci", "windows_standalone_build",
    "disable_metadata", "disable_all_custom_nodes", "whitelist_custom_nodes", "disable_api_nodes",
    "multi_user", "verbose", "log_stdout", "front_end_version", "front_end_root", "comfy_api_base",
    "database_url", "enable_compress_response_body", "enable_assets", "disable_assets_autoscan",
    "enable_asset_hashing", "feature_flag", "list_feature_flags", "fp16_vae", "fp32_vae", "bf16_vae",
    "cpu_vae", "fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp16_text_enc", "fp32_text_enc",
    "bf16_text_enc", "fp16_intermediates",
}  # fmt: skip


def host_comfyui() -> HostComfyUI:
    """Where its packages are, its version, and how it was started.

    Raises:
        InvalidInput: a switch that is set has a value that cannot travel.
    """
    args, defaults = comfy.cli_args.args, comfy.cli_args.parser.parse_args([])
    switches = []
    for name, value in sorted(vars(args).items()):
        # An absent list is None in one place and an empty set in the other.
        if name in OF_THE_HOST or (value or None) == (getattr(defaults, name, None) or None):
            continue
        switches.append((name, _plain(name, value)))
    root = Path(comfy.cli_args.__file__).resolve().parents[1]
    return HostComfyUI(str(root), comfyui_version.__version__, tuple(switches))


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, set) and all(isinstance(item, Enum) for item in value):
        return tuple(sorted(str(item.value) for item in value))
    raise InvalidInput(
        f"ComfyUI was started with --{name.replace('_', '-')} {value}, which cannot be told to the ranks; "
        "start it without."
    )
