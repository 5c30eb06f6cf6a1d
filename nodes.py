"""The mappings that ComfyUI reads, and the binding of the nodes to what is around them.

The node classes are in comfy_xdit/nodes. They are thin and hold no state: what they return is a light
handle, and the ranks compare it with what they have. This file, and all it imports, needs nothing but
the standard library: where a package is missing, each node says which.
"""

from __future__ import annotations

import logging
import sys

from comfy_xdit.nodes.checkpoint import XDiTLoadCheckpoint
from comfy_xdit.nodes.class_label import XDiTClassLabel
from comfy_xdit.nodes.config import XDiTParallelConfig
from comfy_xdit.nodes.controlnet import XDiTControlNetApply, XDiTControlNetLoader
from comfy_xdit.nodes.ip_adapter import XDiTIPAdapterApply, XDiTIPAdapterLoader
from comfy_xdit.nodes.loaders import XDiTLoadDiffusionModel, XDiTLoadPipeline
from comfy_xdit.nodes.lora import XDiTLoraLoader
from comfy_xdit.nodes.packages import install, missing_packages, unavailable
from comfy_xdit.nodes.sampler import XDiTSampler
from comfy_xdit.nodes.status import XDiTStatus
from comfy_xdit.nodes.surroundings import Surroundings, bind
from comfy_xdit.nodes.vae import XDiTLoadVAE, XDiTVAEDecode


def _surroundings() -> Surroundings:
    """ComfyUI inside ComfyUI, headless elsewhere."""
    if "comfy" in sys.modules and "folder_paths" in sys.modules:
        from comfy_xdit.comfy_types.surroundings import COMFYUI

        return COMFYUI
    from comfy_xdit.headless.surroundings import HEADLESS

    return HEADLESS


def _answer_on_the_server() -> None:
    """Where this is a ComfyUI with a server: the read-only route that docs/security.md lists."""
    if "server" in sys.modules and not _missing:
        from comfy_xdit.comfy_types.routes import add_routes

        add_routes()


bind(_surroundings)

NODES = (
    XDiTParallelConfig, XDiTLoadCheckpoint, XDiTLoadPipeline, XDiTLoadDiffusionModel, XDiTLoadVAE,
    XDiTLoraLoader, XDiTControlNetLoader, XDiTControlNetApply, XDiTIPAdapterLoader, XDiTIPAdapterApply,
    XDiTSampler, XDiTVAEDecode, XDiTClassLabel, XDiTStatus,
)  # fmt: skip
for _node in NODES:
    _node.CATEGORY = "xDiT"

_missing = missing_packages()
if _missing:
    logging.getLogger(__name__).warning(
        "comfy_xdit: its nodes do not work until %s are installed. Run: %s",
        ", ".join(_missing),
        install(_missing),
    )

_answer_on_the_server()

NODE_CLASS_MAPPINGS = {n.__name__: unavailable(n, _missing) if _missing else n for n in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {n.__name__: n.TITLE for n in NODES}
