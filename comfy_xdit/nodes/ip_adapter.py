"""The node classes for IP-Adapters. As nodes.py, which lists them, with the standard library alone."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.work import surroundings


class XDiTIPAdapterLoader:
    """An IP-Adapter file, which the ranks read themselves."""

    TITLE = "xDiT Load IP-Adapter"
    DESCRIPTION = "Names an IP-Adapter file for xDiT IP-Adapter Apply; the ranks read it."
    RETURN_TYPES = ("XDIT_IP_ADAPTER",)
    RETURN_NAMES = ("ip_adapter",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        file = {"tooltip": "Files in models/ipadapter: XLabs' for FLUX.1, InstantX' for SD3.5."}
        return {"required": {"ipadapter_name": (surroundings().ip_adapters(), file)}}

    @classmethod
    def IS_CHANGED(cls, ipadapter_name: str) -> tuple[int, int]:
        """Another file under the same name is another adapter."""
        from comfy_xdit.remote.ip_adapter import ip_adapter_stamp

        return ip_adapter_stamp(ipadapter_name, surroundings())

    def load(self, ipadapter_name: str) -> tuple[Any]:
        """Find the file."""
        from comfy_xdit.remote.ip_adapter import load_ip_adapter

        return (load_ip_adapter(ipadapter_name, surroundings()),)


class XDiTIPAdapterApply:
    """A MODEL that is prompted by a picture."""

    TITLE = "xDiT IP-Adapter Apply"
    DESCRIPTION = (
        "Prompts an xDiT MODEL with a picture. Chain several for several pictures or adapters. The negative "
        "prompt does not see the picture."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        weight = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01, "round": 0.001}
        percent = {"min": 0.0, "max": 1.0, "step": 0.001, "round": 0.0001}
        picture = {"tooltip": "From CLIP Vision Encode, with the encoder that the adapter was made with."}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From an xDiT loader, or another node after it."}),
                "ip_adapter": ("XDIT_IP_ADAPTER", {"tooltip": "From xDiT Load IP-Adapter."}),
                "clip_vision_output": ("CLIP_VISION_OUTPUT", picture),
                "weight": ("FLOAT", weight | {"tooltip": "How strongly the picture counts; 0: not at all."}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, "tooltip": "Where in the run it begins."} | percent,
                ),
                "end_percent": ("FLOAT", {"default": 1.0, "tooltip": "Where in the run it ends."} | percent),
            }
        }

    def apply(self, **inputs: Any) -> tuple[Any]:
        """Have the ranks check the file and the picture."""
        from comfy_xdit.remote.ip_adapter import apply_ip_adapter

        return (apply_ip_adapter(**inputs, here=surroundings()),)
