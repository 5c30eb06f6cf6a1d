"""The nodes for IP-Adapters: a MODEL that is prompted by pictures."""

from __future__ import annotations

import math
from typing import Any

from comfy_xdit.nodes.surroundings import Surroundings, check_name, surroundings
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import IPAdapterFile

# What ComfyUI's CLIP Vision Encode gives and adapters take.
OUTPUTS = ("image_embeds", "penultimate_hidden_states")


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
        return {"required": {"ipadapter_name": (surroundings().names("ipadapter"), file)}}

    @classmethod
    def IS_CHANGED(cls, ipadapter_name: str) -> tuple[int, int]:
        """Another file under the same name is another adapter."""
        return load_ip_adapter(ipadapter_name, surroundings()).stamp

    @classmethod
    def VALIDATE_INPUTS(cls, ipadapter_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name("ipadapter", ipadapter_name)

    def load(self, ipadapter_name: str) -> tuple[Any]:
        """Find the file."""
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
        return (apply_ip_adapter(**inputs, here=surroundings()),)


def load_ip_adapter(name: str, here: Surroundings) -> IPAdapterFile:
    """The file of that name; it is read when it is applied to a MODEL, which says what it has to be."""
    return IPAdapterFile.of(here.path("ipadapter", name))


def apply_ip_adapter(
    model: Any,
    ip_adapter: IPAdapterFile,
    clip_vision_output: Any,
    weight: float,
    start_percent: float,
    end_percent: float,
    here: Surroundings,
) -> Any:
    """The MODEL with a picture, after those it has already. `model` stays as it is.

    Args:
        clip_vision_output: what ComfyUI's CLIP Vision Encode gives.

    Raises:
        InvalidInput: `model` is a stock one, or the file, the picture or the range does not fit.
    """
    import torch

    from comfy_xdit.remote import PicturePrompt

    remote = here.remote_of(model)
    if not isinstance(ip_adapter, IPAdapterFile):
        raise InvalidInput(
            f"ip_adapter is a {type(ip_adapter).__name__}; connect the output of 'xDiT Load IP-Adapter'."
        )
    if not start_percent < end_percent:
        raise InvalidInput(
            f"start_percent {start_percent} is not before end_percent {end_percent}; make it smaller."
        )
    if not math.isfinite(weight):
        raise InvalidInput(f"weight is {weight}; set a finite number.")
    if weight == 0:  # as a LoRA at strength 0: the file is not even read
        return model
    found = {name: getattr(clip_vision_output, name, None) for name in OUTPUTS}
    encoded = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    here.begin()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoded.items()}
    with here.interruptible():
        told = remote.check_ip_adapter(ip_adapter, shapes, interrupted=here.interrupted)
    embeds = encoded[told["embeds"]].detach().float().cpu()
    if not embeds.isfinite().all():
        raise InvalidInput(
            f"{told['embeds']} of the encoded picture holds values that are not finite (NaN or infinity); "
            "look at the node that made it."
        )
    prompt = PicturePrompt(ip_adapter, embeds, float(weight), float(start_percent), float(end_percent))
    return here.with_picture(model, prompt)
