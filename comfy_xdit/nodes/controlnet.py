"""The nodes for ControlNets that the ranks run."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.surroundings import Surroundings, check_name, surroundings
from comfy_xdit.protocol.spec import CONTROL_TYPES, ControlNet


class XDiTControlNetLoader:
    """A ControlNet that the ranks read from its file."""

    TITLE = "xDiT ControlNet Loader"
    DESCRIPTION = (
        "A ControlNet for SD3 or FLUX.1 that runs in the ranks of the xDiT MODEL it is used with. "
        "Drop-in for Load ControlNet Model."
    )
    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in ControlNetLoader's order."""
        file = {"tooltip": "Files, and diffusers folders, in models/controlnet."}
        return {"required": {"control_net_name": (surroundings().names("controlnet"), file)}}

    @classmethod
    def IS_CHANGED(cls, control_net_name: str) -> tuple[int, int]:
        """Another file under the same name is another ControlNet."""
        return ControlNet.of(surroundings().path("controlnet", control_net_name)).stamp

    @classmethod
    def VALIDATE_INPUTS(cls, control_net_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name("controlnet", control_net_name)

    def load(self, control_net_name: str) -> tuple[Any]:
        """Look at the file's header; the ranks read the weights when a MODEL samples."""
        return (open_controlnet(control_net_name, surroundings()),)


class XDiTControlNetApply:
    """A conditioning with a ControlNet."""

    TITLE = "xDiT ControlNet Apply"
    DESCRIPTION = (
        "Adds a ControlNet of the ranks to a conditioning. Use one node for the positive and one for the "
        "negative prompt, with equal inputs: they are then computed together."
    )
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in ControlNetApplyAdvanced's order."""
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01, "round": 0.001}
        share = {"min": 0.0, "max": 1.0, "step": 0.001, "round": 0.001}
        return {
            "required": {
                "conditioning": ("CONDITIONING", {"tooltip": "Of the positive or the negative prompt."}),
                "control_net": ("CONTROL_NET", {"tooltip": "From 'xDiT ControlNet Loader'."}),
                "image": ("IMAGE", {"tooltip": "The hint: edges, depth ... as the ControlNet was trained."}),
                "strength": ("FLOAT", strength | {"tooltip": "1: as trained. 0: without it."}),
                "start": ("FLOAT", share | {"default": 0.0, "tooltip": "Share of the run before it acts."}),
                "end": ("FLOAT", share | {"default": 1.0, "tooltip": "Share of the run until it acts."}),
            },
            "optional": {
                "vae": ("VAE", {"tooltip": "The model's VAE: most ControlNets for SD3 and FLUX.1 need it."}),
                "control_type": (
                    list(CONTROL_TYPES),
                    {"tooltip": "Of a union ControlNet; none of any other."},
                ),
            },
        }

    def apply(self, **inputs: Any) -> tuple[list[Any]]:
        """The conditioning with the ControlNet behind those it has already."""
        return (apply_controlnet(**inputs, here=surroundings()),)


def open_controlnet(name: str, here: Surroundings) -> Any:
    """The CONTROL_NET over one file or folder.

    Raises:
        InvalidInput: nothing is there, or it is no ControlNet for the ranks.
    """
    from comfy_xdit.protocol.controlnet_files import kind_at
    from comfy_xdit.remote import RemoteControlNet

    path = here.path("controlnet", name)
    spec = ControlNet.of(path)
    return here.controlnet_of(RemoteControlNet(spec, kind_at(path, spec.name)))


def apply_controlnet(
    conditioning: list[Any],
    control_net: Any,
    image: Any,
    strength: float,
    start: float,
    end: float,
    here: Surroundings,
    control_type: str = "none",
    vae: Any = None,
) -> list[Any]:
    """`conditioning` with the ControlNet behind those it has already.

    Raises:
        InvalidInput: no ControlNet of the ranks, or a value that cannot be.
    """
    from comfy_xdit.remote import checked_application

    net = here.remote_controlnet_of(control_net)
    application = checked_application(net, image, strength, start, end, control_type, vae)
    return here.with_controlnet(conditioning, control_net, application) if strength != 0 else conditioning
